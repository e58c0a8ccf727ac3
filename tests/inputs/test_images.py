"""Every format, odd files and mutated bytes: pixels as Pillow reads them, or the right error class."""

from __future__ import annotations

import pickle
import platform
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image

from pipeline.config import Transform
from pipeline.errors import Reject
from pipeline.inputs import images
from pipeline.inputs.images import decode
from tests.inputs.helpers import (
    MAX_PIXELS,
    WHOLE,
    assert_read_as_pillow,
    both,
    differences,
    encode,
    photo,
    png,
    png_chunk,
    preset,
    verdicts,
)

ROOT = Path(__file__).parents[2]

# The module silences these, but pytest puts the filters back for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")


# --- every format ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_reference_reads_every_format_as_pillow(kind: str) -> None:
    data = encode(photo(400, 267), kind)
    _, reference = both(data, Transform())
    np.testing.assert_array_equal(reference.array, preset(data, Transform()))


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_fast_reads_jpeg_as_pillow(which: int, options: dict[str, Any]) -> None:
    data = encode(photo(500, 334, which), "JPEG", **options)
    fast, reference = both(data, WHOLE)
    np.testing.assert_array_equal(fast.array, reference.array)
    found = differences(*both(data, Transform()))
    assert found.max() <= 1


@pytest.mark.parametrize("size", [(1281, 1030), (2111, 2050), (4200, 4099)])
@pytest.mark.parametrize("which", range(5))
def test_large_jpegs_are_read_at_a_fraction(size: tuple[int, int], which: int) -> None:
    """The picture is the same, only no longer to the level: at most what a JPEG of quality 95 costs."""
    transform = Transform(resize=128, crop=112)
    fast, reference = both(encode(photo(*size, which), "JPEG", quality=90), transform)
    found = differences(fast, reference)
    assert found.max() > 1, "it was read in full"
    assert found.mean() < 1
    a, b = (p.array.astype(float) - reference.array.mean((0, 1)) for p in (fast, reference))
    assert (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) > 0.999


def test_results_stay_when_the_next_image_is_decoded() -> None:
    for transform in (Transform(), WHOLE, Transform(resize=None, crop=64)):
        first = decode(encode(photo(300, 300, 0), "JPEG"), transform, MAX_PIXELS).array
        kept = first.copy()
        decode(encode(photo(300, 300, 1), "JPEG"), transform, MAX_PIXELS)
        np.testing.assert_array_equal(first, kept)


# --- odd files ---


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def flipped(data: bytes) -> bytes:
    """A bit wrong in the middle of the compressed pixels."""
    middle = len(data) * 2 // 3
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


PHOTO = photo(160, 120)
JPEG, PNG = encode(PHOTO, "JPEG"), encode(PHOTO, "PNG")
OTHER = photo(160, 120, 1)
PALETTE = PHOTO.convert("P")
PALETTE.info["transparency"] = bytes(range(256))

READ_AS_PILLOW = {
    "jpeg": JPEG,
    "trailing garbage": JPEG + b"garbage",
    "two in one": JPEG + encode(OTHER, "JPEG"),
    "multi-picture": encode(PHOTO, "MPO", save_all=True, append_images=[OTHER]),
    "animated png": encode(PHOTO, "PNG", save_all=True, append_images=[OTHER]),
    "animated gif": encode(PHOTO, "GIF", save_all=True, append_images=[OTHER]),
    "transparent gif": encode(PALETTE, "GIF", transparency=3),
    "animated webp": encode(PHOTO, "WEBP", save_all=True, append_images=[OTHER]),
    "bit flip": flipped(JPEG),
    "a size it hasn't": claiming(JPEG, 320, 240),
    "cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "grey": encode(PHOTO.convert("L"), "JPEG"),
    "4:4:4": encode(PHOTO, "JPEG", subsampling=0),
    "colour profile": encode(PHOTO, "JPEG", icc_profile=b"not a profile" * 20),
    "broken exif": encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*broken"),
    "one pixel": encode(photo(1, 1), "JPEG"),
    "palette": encode(PALETTE, "PNG"),
    "rgba": encode(PHOTO.convert("RGBA"), "PNG"),
    "grey and alpha": encode(PHOTO.convert("LA"), "PNG"),
    "one bit": encode(PHOTO.convert("1"), "PNG"),
    "16-bit rgb": png(2, 1, b"\0" + struct.pack(">6H", 0, 255, 256, 30000, 65280, 65535), depth=16),
    "wrong checksum of the pixels": PNG[:-14] + b"\0\0" + PNG[-12:],
}

REFUSED = {
    "no bytes": (b"", "empty"),
    "html": (b"<!doctype html><html>404</html>", "not_an_image"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "leading garbage": (b"garbage" + JPEG, "not_an_image"),
    "jpeg without its end": (JPEG[:-2], "truncated"),
    "jpeg cut in its header": (JPEG[:100], "truncated"),
    **{
        f"half a {kind}": (data[: len(data) // 2], "truncated")
        for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
        for data in [encode(PHOTO, kind)]
    },
    "half a compressed tiff": (encode(PHOTO, "TIFF", compression="tiff_lzw")[:5000], "truncated"),
    "wrong checksum of the header": (PNG[:29] + b"\0\0\0\0" + PNG[33:], "corrupt"),
    "a size beyond the limit": (claiming(JPEG, 8000, 8000), "too_large"),
    "header bomb": (png(20_000, 20_000, b""), "too_large"),
    "text bomb": (
        png(1, 1, b"\0\0\0\0", extra=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))),
        "too_large",
    ),
    "jpeg xl": (b"\xff\x0a" + bytes(100), "unsupported_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
    "floating-point tiff": (encode(PHOTO.convert("F"), "TIFF"), "unsupported_mode"),
    "32-bit tiff": (encode(PHOTO.convert("I"), "TIFF"), "unsupported_mode"),
    "12-bit jpeg": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "unsupported_mode"),
}


@pytest.mark.parametrize("name", READ_AS_PILLOW)
def test_odd_but_readable(name: str) -> None:
    assert_read_as_pillow(READ_AS_PILLOW[name])


@pytest.mark.parametrize("name", REFUSED)
def test_odd_and_refused(name: str) -> None:
    data, error = REFUSED[name]
    assert verdicts(data) == (error, error)


@pytest.mark.parametrize(("kind", "prefix"), [("PNG", None), ("TIFF", b"II"), ("TIFF", b"MM")])
def test_sixteen_bit_grey_is_scaled(kind: str, prefix: bytes | None) -> None:
    """Pillow's own conversion clips it, which makes nearly every pixel white."""
    grey = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    if prefix == b"MM":
        data = encode(Image.frombytes("I;16B", (60, 40), grey.astype(">u2").tobytes()), kind)
    else:
        data = encode(Image.fromarray(grey), kind)
    assert prefix is None or data.startswith(prefix)
    for pixels in both(data, WHOLE):
        np.testing.assert_array_equal(pixels.array, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, 2))


def test_twelve_bit_grey_is_scaled() -> None:
    """Two pixels, 0x100 and 0xFFF, packed into three bytes of a TIFF."""
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 3, 1), (279, 4, 3)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    data = b"II*\0" + struct.pack("<I", 12) + bytes([0x10, 0x0F, 0xFF, 0]) + directory + bytes(4)
    for pixels in both(data, WHOLE):
        assert pixels.array[0, :, 0].tolist() == [0x10, 0xFF]


def test_the_resized_size_is_limited_too() -> None:
    """1 x 10,000 pixels are 3 kB as a file, and 655 million pixels where the short side becomes 256."""
    for kind, size in (("JPEG", (1, 10_000)), ("PNG", (60_000, 2))):
        data = encode(Image.new("RGB", size), kind)
        assert verdicts(data, Transform()) == ("too_large", "too_large")
        assert verdicts(data, WHOLE) == ("", "")
    data = encode(photo(100, 50), "PNG")
    assert verdicts(data, WHOLE, max_pixels=5000) == ("", "")
    assert verdicts(data, WHOLE, max_pixels=4999) == ("too_large", "too_large")


@pytest.mark.parametrize("name", REFUSED)
def test_messages_are_the_same_every_time(name: str) -> None:
    said = set()
    for _ in range(2):
        with pytest.raises(Reject) as rejected:
            decode(REFUSED[name][0], WHOLE, MAX_PIXELS)
        said.add(rejected.value.message)
    assert len(said) == 1


# --- what a worker pays, and what it prints ---


def run_worker(script: str, given: Any) -> str:
    """Run the script in a process of its own, `given` pickled on its standard input; its errors and output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=pickle.dumps(given),
        capture_output=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    return (result.stderr + result.stdout).decode()


def test_a_worker_is_light_and_silent() -> None:
    """No torch, no threads that stay, no warnings from Pillow."""
    plain = [encode(PHOTO, kind) for kind in images.FORMATS] + [encode(PALETTE, "PNG"), READ_AS_PILLOW["broken exif"]]
    script = """
        import os, pickle, sys
        from pipeline.config import Transform
        from pipeline.inputs.images import decode

        assert not {"torch", "ray"} & set(sys.modules)
        before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        for data in pickle.load(sys.stdin.buffer):
            decode(data, Transform(), 50_000_000)
        after = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
        assert after == before, f"{after - before} threads stay"
    """
    assert run_worker(script, plain) == ""


def test_bombs_get_no_memory() -> None:
    gif, bmp = encode(PHOTO, "GIF"), encode(PHOTO, "BMP")
    bombs = [
        png(20_000, 20_000, b""),
        claiming(JPEG, 65_000, 65_000),
        encode(Image.new("RGB", (1, 10_000)), "JPEG"),
        gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        bmp[:18] + struct.pack("<II", 60_000, 60_000) + bmp[26:],
    ]
    script = """
        import pickle, resource, sys
        from pipeline.config import Transform
        from pipeline.errors import Reject
        from pipeline.inputs.images import decode

        bombs = pickle.load(sys.stdin.buffer)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for data in bombs:
            try:
                decode(data, Transform(), 50_000_000)
            except Reject as reject:
                assert reject.error == "too_large", reject
            else:
                raise AssertionError("a bomb was decoded")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown / (1024 if sys.platform == "linux" else 1024**2) < 20, f"{grown} more"
    """
    assert run_worker(script, bombs) == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is for glibc's allocator")
def test_memory_is_kept_from_one_image_to_the_next() -> None:
    script = """
        import pickle, resource, sys
        from pipeline.config import Transform
        from pipeline.inputs.images import decode

        data = pickle.load(sys.stdin.buffer)
        for _ in range(10):
            decode(data, Transform(), 50_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            decode(data, Transform(), 50_000_000)
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50
        assert faults < 30, f"{faults} page faults an image"
    """
    assert run_worker(script, encode(photo(500, 375), "JPEG")) == ""


def test_what_the_module_sets_for_the_process() -> None:
    """The size limit is max_pixels alone, and an AVIF takes one core: no test can see either without 180 megapixels."""
    assert Image.MAX_IMAGE_PIXELS is None
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1
