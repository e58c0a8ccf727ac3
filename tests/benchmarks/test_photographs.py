"""What the benchmarks take for photographs, and what they refuse with a sentence."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.photographs import images_in, refuse_turned, refuse_unreadable


def jpeg(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 40, 40)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_what_the_arms_would_read_in_different_ways_is_refused() -> None:
    """Torchvision's preset and the peers leave an image as it lies."""
    good = [("a.jpg", jpeg()), ("b.jpg", jpeg())]
    refuse_unreadable(good)
    refuse_turned(good)
    with pytest.raises(SystemExit, match=r"c.jpg cannot be read .*take images that can"):
        refuse_unreadable([*good, ("c.jpg", jpeg()[:200])])
    with pytest.raises(SystemExit, match=r"d.jpg is stored on its side"):
        refuse_turned([*good, ("d.jpg", jpeg(6))])


def test_images_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "c.txt", "d.png"):
        (tmp_path / name).touch()
    assert [path.name for path in images_in(tmp_path)] == ["a.jpeg", "b.JPG", "d.png"]
    assert [path.name for path in images_in(tmp_path, (".png",))] == ["d.png"]


SENTENCES = {
    "missing": "is no folder",
    "empty": "folder|no images",
    "one": "one photograph only|too few to show anything",
    "turned": "on its side",
}


@pytest.mark.parametrize(
    ("benchmark", "source"),
    [
        *((benchmark, source) for benchmark in ("compare", "images") for source in ("missing", "empty", "turned")),
        *((benchmark, source) for benchmark in ("compare", "numerics") for source in ("one",)),
        ("feeding", "missing"),
        ("numerics", "missing"),
    ],
)
def test_a_benchmark_says_in_a_sentence_what_it_cannot_measure_with(
    benchmark: str, source: str, tmp_path: Path
) -> None:
    folder = tmp_path / source
    if source != "missing":
        folder.mkdir()
    if source in ("one", "turned"):
        (folder / "a.jpg").write_bytes(jpeg(6 if source == "turned" else 1))
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "Traceback" not in found.stderr
    assert re.search(SENTENCES[source], found.stderr), found.stderr
