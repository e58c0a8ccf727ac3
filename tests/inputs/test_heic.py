"""HEIC: read as pillow-heif reads it, within the same limits and with the same classes, and refused where that is not
installed."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from pipeline.config import Transform
from pipeline.errors import Reject
from pipeline.inputs import heif, images
from pipeline.inputs.images import decode, encoded
from tests.inputs.helpers import MAX_PIXELS, WHOLE, assert_read_as_pillow, both, encode, photo, verdicts
from tests.inputs.reading import samples
from tests.inputs.test_images import run_worker
from tests.support.tars import tar

# The module silences these, but pytest puts the filters back for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

heif.opener()  # so that Pillow writes and reads HEIC here, too
PHOTO = photo(160, 120)
HEIC = encode(PHOTO, "HEIF", quality=90)


def deep(pixels: np.ndarray, mode: str, bits: int) -> bytes:
    """A HEIC of 10 or 12 bits, of which these 8 are the upper ones."""
    before = pillow_heif.options.SAVE_HDR_TO_12_BIT
    pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
    try:
        size = (pixels.shape[1], pixels.shape[0])
        file = pillow_heif.from_bytes(mode, size, (pixels.astype(np.uint16) << 8).tobytes())
        buffer = io.BytesIO()
        file.save(buffer, quality=95)
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = before
    return buffer.getvalue()


def sized(width: int, height: int) -> bytes:
    return b"ispe\0\0\0\0" + struct.pack(">II", width, height)


def claiming(data: bytes, size: tuple[int, int], other: tuple[int, int]) -> bytes:
    """With another size in the container; the pixels are what they were."""
    assert sized(*size) in data
    return data.replace(sized(*size), sized(*other))


GRID = encode(photo(256, 192), "HEIF", quality=60, tile_size=64)
GRID_SPEC = bytes([0, 0, 2, 3]) + struct.pack(">HH", 256, 192)  # three rows of four
CROPPED = encode(photo(101, 67), "HEIF", quality=90)  # the codec has even sizes only


def box(data: bytes, *path: bytes) -> tuple[int, int]:
    """Begin and end of what is in a box in boxes."""
    begin, end = 0, len(data)
    for name in path:
        begin, end = next((at, to) for found, at, to in heif._boxes(data, begin, end) if found == name)
        begin += 4 if name in (b"meta", b"iref") else 0
    return begin, end


def repeated(rows: int, columns: int, width: int, height: int) -> bytes:
    """GRID as one of so many tiles, all of them the first, that shows so much of them."""
    data, spec = bytearray(GRID), bytes([0, 0, rows - 1, columns - 1]) + struct.pack(">HH", width, height)
    begin, end = box(GRID, b"meta", b"iref", b"dimg")
    tiles = GRID[begin : begin + 2] + struct.pack(">H", rows * columns) + GRID[begin + 4 : begin + 6] * rows * columns
    more = len(tiles) - (end - begin)
    for at in (box(GRID, b"meta")[0] - 12, box(GRID, b"meta", b"iref")[0] - 12, begin - 8):
        data[at : at + 4] = struct.pack(">I", int.from_bytes(data[at : at + 4]) + more)
    locations = box(GRID, b"meta", b"iloc")[0]
    for part in range(int.from_bytes(GRID[locations + 6 : locations + 8])):
        at = locations + 8 + 16 * part  # number, where, file, pieces; offset and length of the only piece
        if not GRID[at + 3]:
            data[at + 8 : at + 12] = struct.pack(">I", int.from_bytes(data[at + 8 : at + 12]) + more)
    data[begin:end] = tiles
    return claiming(bytes(data).replace(GRID_SPEC, spec), (256, 192), (width, height))


READ_AS_PILLOW = {
    "heic": HEIC,
    "grey": encode(PHOTO.convert("L"), "HEIF"),
    "grey and alpha": encode(PHOTO.convert("LA"), "HEIF"),
    "rgba": encode(PHOTO.convert("RGBA"), "HEIF"),
    "4:4:4": encode(PHOTO, "HEIF", chroma=444),
    "odd size": CROPPED,
    "grid": GRID,
    "grid of the same tile": repeated(3, 4, 256, 192),
    "grid with a damaged tile": GRID[:-800] + bytes(300) + GRID[-500:],
    "grid that hangs over": repeated(3, 4, 100, 100),
    "one pixel": encode(photo(1, 1), "HEIF"),
    "several pictures": encode(PHOTO, "HEIF", save_all=True, append_images=[photo(80, 64, 1)]),
    "second picture is the first": encode(
        PHOTO, "HEIF", save_all=True, append_images=[photo(80, 64, 1)], primary_index=1
    ),
    "thumbnail": encode(photo(400, 300), "HEIF", thumbnails=[128]),
    "colour profile": encode(PHOTO, "HEIF", icc_profile=b"not a profile" * 20),
    "broken exif": encode(PHOTO, "HEIF", exif=b"Exif\0\0MM\0*broken"),
    "10-bit": deep(np.asarray(PHOTO), "RGB;16", 10),
    "12-bit": deep(np.asarray(PHOTO), "RGB;16", 12),
    "trailing garbage": HEIC + b"garbage" * 10,
}


@pytest.mark.parametrize("name", READ_AS_PILLOW)
def test_heic_is_read_as_pillow_reads_it(name: str) -> None:
    assert_read_as_pillow(READ_AS_PILLOW[name])


def test_the_pixels_are_those_of_the_photograph() -> None:
    for data in (HEIC, READ_AS_PILLOW["rgba"], READ_AS_PILLOW["10-bit"], READ_AS_PILLOW["12-bit"]):
        (pixels, _) = both(data, WHOLE)
        assert np.abs(pixels.array.astype(int) - np.asarray(PHOTO)).mean() < 5


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_grey_is_scaled(bits: int) -> None:
    grey = np.asarray(PHOTO.convert("L"))
    for pixels in both(deep(grey, "L;16", bits), WHOLE):
        assert np.abs(pixels.array.astype(int) - grey[:, :, None]).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_it_is_turned_upright_once(orientation: int, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    given: dict[str, Any] = {"exif": exif.tobytes()} if where == "exif" else {"xmp": xmp}
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(PHOTO, "PNG", exif=exif.tobytes())))))
    for pixels in both(encode(PHOTO, "HEIF", quality=90, **given), WHOLE):
        assert (pixels.height, pixels.width) == expected.shape[:2]
        assert np.abs(pixels.array.astype(int) - expected).mean() < 5


def test_the_container_turns_it_and_not_the_exif_beside() -> None:
    """As phones' own viewers do: a picture whose EXIF alone is turned would else be turned by some."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO, "HEIF", quality=90, exif=exif.tobytes())
    straight = data.replace(b"irot\3", b"irot\0")
    assert straight != data
    (pixels, _) = both(straight, WHOLE)
    assert (pixels.width, pixels.height) == (160, 120)


def test_the_device_is_not_asked() -> None:
    assert encoded(HEIC, Transform(decode="nvjpeg"), MAX_PIXELS) is None


# --- refused ---

META = HEIC.index(b"meta")
REFUSED = {
    "no pixels": (HEIC[: HEIC.index(b"mdat") - 4], "truncated"),
    "no metadata": (HEIC[: META - 4], "truncated"),
    "a grid without pixels": (GRID[: GRID.index(b"mdat") - 4], "truncated"),
    "a grid without its last byte": (GRID[:-1], "truncated"),
    "half": (HEIC[: len(HEIC) // 2], "truncated"),
    "no boxes": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "corrupt"),
    "a larger picture than it claims": (claiming(HEIC, (160, 120), (80, 60)), "corrupt"),
    "a smaller picture than it claims": (claiming(HEIC, (160, 120), (320, 240)), "corrupt"),
    "a size beyond our limit": (claiming(HEIC, (160, 120), (10_000, 6_000)), "too_large"),
    "a size beyond libheif's limit": (claiming(HEIC, (160, 120), (60_000, 60_000)), "too_large"),
    "no size": (claiming(HEIC, (160, 120), (0, 0)), "corrupt"),
    "tiles that do not cover it": (GRID.replace(GRID_SPEC, GRID_SPEC[:4] + b"\x4e\x20\x4e\x20"), "corrupt"),
    "tiles beyond our limit": (claiming(GRID, (64, 64), (10_000, 6_000)), "too_large"),
    "tiles without end": (repeated(100, 100, 64, 64), "too_large"),
    "large tiles again and again": (claiming(repeated(20, 20, 60, 60), (64, 64), (5000, 5000)), "too_large"),
    "a second picture beyond our limit": (
        claiming(READ_AS_PILLOW["several pictures"], (80, 64), (10_000, 6_000)),
        "too_large",
    ),
    "another codec": (HEIC.replace(b"hvc1", b"vvc1"), "unsupported_format"),
    "pixels of nothing": (HEIC[: HEIC.index(b"mdat") + 4] + bytes(len(HEIC) - HEIC.index(b"mdat") - 4), "corrupt"),
    "64 x 64,000": (encode(Image.new("RGB", (64, 64_000)), "HEIF"), "too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heic_that_is_refused(name: str) -> None:
    data, error = REFUSED[name]
    begin = time.process_time()
    assert verdicts(data, Transform()) == (error, error)
    assert time.process_time() - begin < 1
    said = set()
    for _ in range(2):
        with pytest.raises(Reject) as rejected:
            decode(data, Transform(), MAX_PIXELS)
        said.add(rejected.value.message)
    assert len(said) == 1


def test_the_limit_is_checked_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(HEIC, max_pixels=160 * 120) == ("", "")

    def load(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", load)
    assert verdicts(HEIC, max_pixels=160 * 120 - 1) == ("too_large", "too_large")


@pytest.mark.parametrize("name", ["heic", "grid", "several pictures", "10-bit"])
def test_heic_cut_off_anywhere_is_refused_or_whole(name: str) -> None:
    data = READ_AS_PILLOW[name]
    whole = decode(data, WHOLE, MAX_PIXELS).array
    for cut in {*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 20, len(data))}:
        try:
            pixels = decode(data[:cut], WHOLE, MAX_PIXELS)
        except Reject as reject:
            assert reject.error in ("empty", "not_an_image", "truncated", "corrupt"), (cut, reject.error)
        else:
            np.testing.assert_array_equal(pixels.array, whole, err_msg=f"cut at {cut}")


def test_avif_stays_with_pillow() -> None:
    assert not heif.is_heif(encode(PHOTO, "AVIF"))
    sequence = encode(PHOTO, "AVIF", save_all=True, append_images=[photo(160, 120, 1)])
    assert not heif.is_heif(sequence)
    of_mif1 = encode(PHOTO, "AVIF").replace(b"ftypavif", b"ftypmif1", 1)
    assert not heif.is_heif(of_mif1)
    assert_read_as_pillow(of_mif1)


def test_lengths_of_boxes_in_all_their_forms() -> None:
    wide = struct.pack(">I4sQ", 1, b"wide", 18) + b"ab"
    endless = struct.pack(">I", 0) + b"endl" + b"abc"
    data = struct.pack(">I", 12) + b"ftypheic" + wide + endless
    found = {name: data[begin:end] for name, begin, end in heif._boxes(data, 0, len(data))}
    assert found == {b"ftyp": b"heic", b"wide": b"ab", b"endl": b"abc"}
    for broken in (b"\0\0\0\1meta", b"\0\0\0\7meta", b"\0\0\0", struct.pack(">I4sQ", 1, b"free", 0)):
        assert len(list(heif._boxes(broken, 0, len(broken)))) <= 1


def test_parts_in_parts_are_counted_and_end() -> None:
    pixels = {1: 100, 2: 10, 3: 1}
    assert heif._work(pixels, {}) == 0
    assert heif._work(pixels, {1: [2, 2, 9], 2: [3, 3, 3]}) == 100 + 2 * (10 + 3)
    for endless in ({1: [1]}, {1: [2], 2: [1]}, {part: [part + 1] for part in range(1000)}):
        with pytest.raises(Reject, match="more than 10 deep"):
            heif._work(pixels, endless)
    doubled = {part: [part + 1] * 1000 for part in range(9)}
    assert heif._work({9: 1}, doubled) == 1000**9


# --- a folder and a tar; and what it costs ---


def test_heic_in_a_folder_and_in_a_tar_are_rows(tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/IMG_1.HEIC").write_bytes(HEIC)
    (tmp_path / "a.tar").write_bytes(tar(("IMG_1.heic", HEIC)))
    for place in ("loose", "a.tar"):
        (row,) = samples(tmp_path / place)
        assert row.data is not None
        assert verdicts(row.data) == ("", "")


def test_other_images_do_not_load_it_and_heic_leaves_no_threads() -> None:
    script = """
        import os, pickle, sys
        from pipeline.config import Transform
        from pipeline.inputs.images import decode

        others, heic = pickle.load(sys.stdin.buffer)
        for data in others:
            decode(data, Transform(), 50_000_000)
        assert not [name for name in sys.modules if "heif" in name.lower() and not name.startswith("pipeline")]
        before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        for data in heic:
            decode(data, Transform(), 50_000_000)
        assert "pillow_heif" in sys.modules
        after = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        assert after == before, f"{after - before} threads stay"
    """
    others = [encode(PHOTO, kind) for kind in images.FORMATS]
    assert run_worker(script, (others, [HEIC, GRID, READ_AS_PILLOW["10-bit"]])) == ""


def test_memory_follows_the_limit_on_pixels() -> None:
    side = 1200
    large = Image.new("RGB", (side, side), (9, 99, 200))
    read = [deep(np.asarray(large), "RGB;16", 10), deep(np.asarray(large.convert("L")), "L;16", 12)]
    read += [encode(large.convert("RGBA"), "HEIF"), encode(large, "HEIF"), encode(large, "HEIF", tile_size=256)]
    script = """
        import pickle, sys
        from pathlib import Path
        from pipeline.config import Transform
        from pipeline.inputs.images import decode

        def memory(what):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

        def cost(data, transform):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = memory("VmRSS")
            decode(data, transform, 50_000_000)
            return memory("VmHWM") - before

        small, read, pixels = pickle.load(sys.stdin.buffer)
        cost(small, Transform())  # loads the library
        ways = [Transform(crop=None), Transform(resize=1190, crop=None, decode="reference")]
        print(max(cost(data, way) / pixels for data in read for way in ways))
    """
    assert float(run_worker(script, (HEIC, read, side * side)).splitlines()[-1]) < 26.5


# --- without pillow-heif ---


def test_without_pillow_heif_it_is_an_unsupported_format_that_says_what_to_install() -> None:
    script = """
        import pickle, sys
        from pipeline.config import Transform
        from pipeline.errors import Reject
        from pipeline.inputs.images import decode

        sys.modules["pillow_heif"] = None  # an import of it raises ImportError
        heic, others = pickle.load(sys.stdin.buffer)
        for mode in ("fast", "reference"):
            for _ in range(2):
                try:
                    decode(heic, Transform(decode=mode), 50_000_000)
                except Reject as reject:
                    print(reject.stage, reject.error, reject.message)
        for data in others:
            decode(data, Transform(), 50_000_000)
    """
    said = run_worker(script, (HEIC, [encode(PHOTO, "JPEG"), encode(PHOTO, "AVIF")])).splitlines()
    assert len(said) == 4
    assert len(set(said)) == 1
    assert said[0].startswith("decode unsupported_format this is HEIC")
    for way in ("pip install pillow-heif", "every node"):
        assert way in said[0]
