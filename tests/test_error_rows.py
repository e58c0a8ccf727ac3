"""Error rows counted, and the bytes behind them written out, without trusting a name that comes from a shard."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.error_rows import file_name
from pipeline.errors import ConfigError, NotFound, SourceChanged
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.tars import write_tar
from pipeline.outputs.schema import Footer, errors_schema, write_parquet
from pipeline.storage import Store
from tests.support.datasets import commit_all
from tests.support.jobs import BROKEN, digits_config
from tests.support.tars import member, tar

HTML = b"<html>404</html>"
EVIL = "../../../etc/\u202e bad\\..\\name"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars: one bad image; four of three classes, with a name that is no name; and one that is cut off."""
    folder = tmp_path_factory.mktemp("errors")
    good = encode_png(load_digits_images().images[0])
    (folder / "shards").mkdir()
    write_tar(folder / "shards/one.tar", [("a.png", good), ("b.jpg", BROKEN)])
    link = member("link.jpg", kind=b"2", link="/etc/passwd")
    entries = [(f"{EVIL}.jpg", BROKEN), ("c.png", good), ("d.jpg", HTML), ("e.jpg", b""), link, ("f.jpg", HTML)]
    (folder / "shards/worst.tar").write_bytes(tar(*entries))
    whole = tar(("a.png", good), ("b.png", good))
    (folder / "shards/cut.tar").write_bytes(whole[:1300])
    commit_all(digits_config(folder / "shards", folder / "labels"))
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """The dataset to damage and the place for exports; shards stay where they are."""
    (tmp_path / "labels").mkdir()
    for path in (first / "labels").rglob("*"):
        target = tmp_path / "labels" / path.relative_to(first / "labels")
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    return tmp_path


def shard(found: Any, name: str) -> Any:
    (one,) = [one for one in found.shards if one.shard.endswith(f"/{name}")]
    return one


# --- Counts ----------------------------------------------------------------------------------------------------------


def test_counts_by_class_and_by_shard_worst_first(folder: Path):
    found = pipeline.dead_letters(str(folder / "labels"))
    rows = pipeline.read(str(folder / "labels"), errors=True).to_pylist()
    expected = Counter((row["stage"], row["error"]) for row in rows)
    assert found.rows == len(rows) == 7
    assert {(one["stage"], one["error"]): one["rows"] for one in found.classes} == expected
    assert [one["rows"] for one in found.classes] == [2, 2, 1, 1, 1]
    assert [one.shard.rpartition("/")[2] for one in found.shards] == ["worst.tar", "cut.tar", "one.tar"]
    worst = shard(found, "worst.tar")
    assert (worst.rows, worst.without_bytes) == (5, 1)
    assert worst.classes["not_an_image"] == 2
    assert sum(worst.classes.values()) == 5
    assert found.export is None
    assert found.problems == []


def test_only_some_classes(folder: Path):
    found = pipeline.dead_letters(str(folder / "labels"), "empty,not_an_image")
    assert found.rows == 3
    assert [one.id for one in found.shards] == [shard(found, "worst.tar").id]
    with pytest.raises(ConfigError, match=r"no error class 'emty'; did you mean empty\?"):
        pipeline.dead_letters(str(folder / "labels"), ["emty"])


def test_only_errors_parts_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    really_open = Store.open

    def counted(store: Store, url: str, *args: Any, **more: Any) -> BinaryIO:
        opened.append(url)
        return really_open(store, url, *args, **more)

    monkeypatch.setattr(Store, "open", counted)
    pipeline.dead_letters(str(folder / "labels"))
    assert {Path(url).parent.name for url in opened} == {"errors"}
    assert len(opened) == 3


def test_a_damaged_errors_part_is_named_and_hides_no_other(folder: Path):
    name = shard(pipeline.dead_letters(str(folder / "labels")), "worst.tar").id
    (folder / "labels/errors" / f"{name}.parquet").write_bytes(b"PAR1 no")
    found = pipeline.dead_letters(str(folder / "labels"))
    assert found.rows == 2
    (problem,) = found.problems
    assert f"errors/{name}.parquet is damaged or not ours" in problem


def test_where_there_is_no_dataset(tmp_path: Path):
    with pytest.raises(NotFound, match="there is no dataset at"):
        pipeline.dead_letters(str(tmp_path))


def test_counting_takes_no_memory_for_rows(tmp_path: Path):
    """A part of 4,000,000 error rows, 400 MB as a table, is counted in a few."""
    folder = tmp_path / "labels"
    (folder / "errors").mkdir(parents=True)
    identity = {"format_version": "1", "model_fingerprint": "f", "model": {}, "num_classes": 2, "classes": None}
    (folder / "_dataset.json").write_text(json.dumps(identity))
    size, groups = 100_000, 40
    values = {"key": ["k" * 60] * size, "shard": ["file:///x.tar"] * size, "index": range(size)}
    values |= {"stage": ["decode"] * size, "error": ["corrupt"] * size, "message": ["m"] * size}
    values |= {"bytes_sha256": [None] * size, "num_bytes": [None] * size}
    rows = pa.table(values, schema=errors_schema())
    footer = Footer("file:///x.tar", "1", "f", "eager", size * groups, 0, size * groups)
    write_parquet(folder / "errors/x.tar-0123456789abcdef.parquet", errors_schema(), [rows] * groups, footer)
    script = (
        "import sys, pipeline, pyarrow, pyarrow.parquet\n"
        "from pipeline import error_rows, overview\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1024\n"
        "before = peak(); found = pipeline.dead_letters(sys.argv[1]); print(found.rows, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    count, peak_mb = done.stdout.split()
    assert int(count) == size * groups
    assert float(peak_mb) < 40


# --- Export ----------------------------------------------------------------------------------------------------------


def exported(folder: Path) -> dict[str, bytes]:
    """By path below the folder for exports."""
    return {str(p.relative_to(folder / "bad")): p.read_bytes() for p in (folder / "bad").rglob("*") if p.is_file()}


def test_the_bytes_of_bad_samples_under_names_that_are_safe(folder: Path):
    found = pipeline.dead_letters(str(folder / "labels"), export=folder / "bad")
    worst, one = shard(found, "worst.tar").id, shard(found, "one.tar").id
    files = exported(folder)
    assert files[f"{one}/1-b.jpg"] == BROKEN
    assert files[f"{worst}/2-d.bin"] == files[f"{worst}/5-f.bin"] == HTML
    assert files[f"{worst}/3-e.bin"] == b""
    (evil,) = [name for name in files if name.startswith(f"{worst}/0-")]
    assert files[evil] == BROKEN
    assert len(files) == found.export.files == 5
    assert sorted(path.name for path in folder.iterdir()) == ["bad", "labels"]
    assert (found.export.without_bytes, found.export.left_out, found.export.problems) == (2, 0, [])


def test_what_was_recorded_of_the_bytes_holds_for_what_is_exported(folder: Path):
    pipeline.dead_letters(str(folder / "labels"), export=folder / "bad")
    known = {row["bytes_sha256"] for row in pipeline.read(str(folder / "labels"), errors=True).to_pylist()}
    assert {hashlib.sha256(data).hexdigest() for data in exported(folder).values()} == known - {None}


@pytest.mark.parametrize(
    ("key", "data", "name"),
    [
        ("a/b/cat", b"\xff\xd8\xff\xe0", "7-cat.jpg"),
        ("cat.left.PNG", b"", "7-cat.left.PNG"),
        ("..", b"", "7-.bin"),
        ("/etc/passwd", b"GIF89a", "7-passwd.gif"),
        ("..\\..\\boot.ini", b"\x89PNG", "7-boot.ini.png"),
        (".bashrc", b"", "7-bashrc.bin"),
        ("k" * 5000 + ".jpeg", b"", "7-" + "k" * 100 + ".jpeg"),
        ("b\x00l\u202eank \n", b"\0\0\0 ftypavif", "7-b_l_ank__.avif"),
        (None, b"RIFF1234WEBPVP8 ", "7-.webp"),
        ("heic", b"\0\0\0 ftypheic", "7-heic.heic"),
    ],
)
def test_a_file_name(key: str | None, data: bytes, name: str):
    assert file_name(7, key, data) == name


def test_no_more_than_the_limit_and_only_of_a_class(folder: Path):
    url = str(folder / "labels")
    export = pipeline.dead_letters(url, export=folder / "bad", limit=2).export
    assert (export.files, export.left_out, len(exported(folder))) == (2, 3, 2)
    export = pipeline.dead_letters(url, "not_an_image", folder / "html", 1).export
    assert (export.files, export.left_out, export.without_bytes) == (1, 1, 0)
    (path,) = (path for path in (folder / "html").rglob("*") if path.is_file())
    assert path.read_bytes() == HTML


def test_shards_are_read_no_further_than_need_be(folder: Path, monkeypatch: pytest.MonkeyPatch):
    indices = []
    from pipeline import error_rows

    def counted(*args: Any) -> Any:
        for sample in read(*args):
            indices.append(sample.index)
            yield sample

    read = error_rows.read
    monkeypatch.setattr(error_rows, "read", counted)
    pipeline.dead_letters(str(folder / "labels"), "empty", folder / "bad")
    assert indices == [0, 1, 2, 3]


def test_shards_that_changed_or_went_are_named(first: Path, folder: Path):
    url = str(folder / "labels")
    config = digits_config(first / "shards/one.tar", url)
    export = pipeline.dead_letters(url, export=folder / "bad", config=config).export
    assert export.files == 1
    assert [p for p in export.problems if "worst.tar is no longer in the input: 4 not exported" in p]
    assert len(export.problems) == 1, "the one that is cut off has no bytes to export"
    path = first / "shards/one.tar"
    stat = path.stat()
    os.utime(path, ns=(0, 0))
    try:
        export = pipeline.dead_letters(url, export=folder / "again", config=config).export
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert export.files == 0
    assert any("one.tar has changed since it was committed: 1 not exported" in p for p in export.problems)
    assert not (folder / "again").exists()


def test_an_errors_part_that_is_replaced_meanwhile_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    name = shard(pipeline.dead_letters(str(folder / "labels")), "worst.tar").id
    disturbed = iter([False, True, True])  # it is counted, and then replaced twice
    really_open = Store.open

    def replaced(store: Store, url: str, *args: Any, **more: Any) -> BinaryIO:
        if url.endswith(f"errors/{name}.parquet") and next(disturbed, False):
            raise SourceChanged("replaced")
        return really_open(store, url, *args, **more)

    monkeypatch.setattr(Store, "open", replaced)
    found = pipeline.dead_letters(str(folder / "labels"), export=folder / "bad")
    assert (found.rows, found.export.files, found.export.problems) == (7, 5, [])


def test_bytes_that_are_not_those_that_were_recorded_are_named(folder: Path):
    name = shard(pipeline.dead_letters(str(folder / "labels")), "one.tar").id
    path = folder / "labels/errors" / f"{name}.parquet"
    rows, schema = pq.read_table(path), pq.read_schema(path)
    other = rows.set_column(rows.schema.get_field_index("bytes_sha256"), "bytes_sha256", pa.array(["0" * 64]))
    pq.write_table(other.replace_schema_metadata(schema.metadata), path)
    export = pipeline.dead_letters(str(folder / "labels"), export=folder / "bad").export
    assert export.files == 4
    (problem,) = export.problems
    assert problem.endswith("one.tar index 1: its bytes are not those that were recorded")


def test_without_a_report_a_config_is_needed(first: Path, folder: Path):
    for report in (folder / "labels/_runs").rglob("report.json"):
        report.unlink()
    url = str(folder / "labels")
    assert pipeline.dead_letters(url).rows == 7
    with pytest.raises(ConfigError, match=r"--export takes the config .*no report tells .*Give --config"):
        pipeline.dead_letters(url, export=folder / "bad")
    config = digits_config(first / "shards", url)
    assert pipeline.dead_letters(url, export=folder / "bad", config=config).export.files == 5


def test_a_place_that_cannot_be_written(folder: Path):
    (folder / "bad").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write .*/bad/.*Choose another folder"):
        pipeline.dead_letters(str(folder / "labels"), export=folder / "bad")
    with pytest.raises(ConfigError, match="no local folder"):
        pipeline.dead_letters(str(folder / "labels"), export="s3://bucket/bad")
