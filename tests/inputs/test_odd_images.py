"""Files that are made to do harm, and odd ones beyond test_images.py: docs/odd-inputs.md is the table of them all."""

from __future__ import annotations

import io
import itertools
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.config import Transform
from pipeline.errors import Reject
from pipeline.inputs import guards
from pipeline.inputs.images import decode
from tests.inputs.helpers import (
    MAX_PIXELS,
    WHOLE,
    assert_read_as_pillow,
    both,
    encode,
    photo,
    png,
    png_chunk,
    verdicts,
)
from tests.inputs.test_images import JPEG, PHOTO, PNG, run_worker

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(PHOTO))  # of a PNG, without filters
BLACK_PNG_ROWS = bytes(121 * 7)  # 40 pixels wide, RGB
BMP = encode(PHOTO, "BMP")
SCAN = JPEG.index(b"\xff\xda")
FRAME = JPEG.index(b"\xff\xc0")


# --- builders ---


def tiff(entries: list[tuple[int, int, Any]], data: bytes = b"", order: str = "<") -> bytes:
    """A TIFF of one directory: tag, type (3: short, 4: long, 16, 17: eight bytes), value or values. `data` at 8."""
    values, directory = b"", struct.pack(f"{order}H", len(entries))
    behind = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, kind, value in entries:
        numbers = value if isinstance(value, list) else [value]
        packed = struct.pack(f"{order}{len(numbers)}{ {3: 'H', 4: 'I', 16: 'Q', 17: 'Q'}[kind] }", *numbers)
        where = packed.ljust(4, b"\0")
        if len(packed) > 4:
            where, values = struct.pack(f"{order}I", behind + len(values)), values + packed
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + where
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return begin + data + directory + bytes(4) + values


def grey_tiff(
    width: int,
    height: int,
    strips: list[bytes],
    rows: int,
    *,
    bits: int = 8,
    photometric: int = 1,
    compression: int = 1,
) -> bytes:
    places = list(itertools.accumulate((len(s) for s in strips), initial=8))[:-1]
    entries: list[tuple[int, int, Any]] = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, compression)]
    entries += [(262, 3, photometric), (273, 4, places), (277, 3, 1), (278, 4, rows)]
    return tiff([*entries, (279, 4, [len(s) for s in strips])], b"".join(strips))


def one_pixel_tags(bits: Any, photometric: int = 1, sample_format: Any = 1) -> list[tuple[int, int, Any]]:
    entries: list[tuple[int, int, Any]] = [(256, 4, 1), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    samples = len(bits) if isinstance(bits, list) else 1
    return [*entries, (273, 4, 8), (277, 3, samples), (278, 4, 1), (279, 4, 8), (339, 3, sample_format)]


def tiled_tiff(width: int, length: int, kind: int = 4) -> bytes:
    body = zlib.compress(bytes(1000))
    entries: list[tuple[int, int, Any]] = [(256, 4, 64), (257, 4, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1)]
    entries += [(277, 3, 1), (322, kind, width), (323, kind, length), (324, 4, 8), (325, 4, len(body))]
    return tiff(entries, body)


def rle_bmp(width: int, height: int, data: bytes) -> bytes:
    palette = b"".join(bytes([n, n, n, 0]) for n in range(256))
    head = struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078)
    return (
        b"BM" + head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0) + palette + data
    )


def gif(width: int, height: int, *blocks: bytes) -> bytes:
    """Black and white are its colours."""
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"".join(blocks) + b";"
    )


def gif_frame(x: int, y: int, width: int, height: int) -> bytes:
    """Of one pixel's data, white."""
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + b"\2\2\x4c\1\0"


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_on_a_canvas(width: int, height: int) -> bytes:
    """An animation of one frame of 160 x 120."""
    three = lambda n: struct.pack("<I", n)[:3]  # noqa: E731
    frame = three(0) + three(0) + three(159) + three(119) + three(100) + b"\0" + encode(PHOTO, "WEBP")[12:]
    canvas = bytes([2, 0, 0, 0]) + three(width - 1) + three(height - 1)
    body = b"WEBP" + riff_chunk(b"VP8X", canvas) + riff_chunk(b"ANIM", bytes(6)) + riff_chunk(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def lossless_jpeg(width: int, height: int, components: int) -> bytes:
    """All pixels are 128: no difference from what is predicted, which takes a bit each."""
    numbers = range(1, components + 1)
    frame = b"\x08" + struct.pack(">HHB", height, width, components) + b"".join(bytes([n, 0x11, 0]) for n in numbers)
    scan = bytes([components]) + b"".join(bytes([n, 0]) for n in numbers) + b"\1\0\0"
    table = b"\0" + bytes([1] + [0] * 15) + b"\0"
    bits = bytes(-(-width * height * components // 8))
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, table) + segment(0xDA, scan) + bits + b"\xff\xd9"


def many_scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def resized_frame(width: int, height: int) -> bytes:
    return JPEG[FRAME : FRAME + 5] + struct.pack(">HH", height, width) + JPEG[FRAME + 9 : FRAME + 19]


# --- read as Pillow reads it ---

CMYK = encode(PHOTO.convert("CMYK"), "JPEG")
ADOBE = CMYK.index(b"Adobe")
ARITHMETIC = JPEG.replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11", 1)[: SCAN + 14] + b"\xff\xd9"
WHITE_RLE = b"".join(b"\x28\xff\0\0" for _ in range(7)) + b"\0\1"

READ_AS_PILLOW = {
    "ycck": CMYK[: ADOBE + 11] + b"\2" + CMYK[ADOBE + 12 :],
    "4:1:1": simplejpeg.encode_jpeg(np.asarray(PHOTO), colorsubsampling="411"),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(PHOTO), colorsubsampling="440"),
    "progressive 4:4:4": encode(PHOTO, "JPEG", progressive=True, subsampling=0),
    "restart markers": encode(PHOTO, "JPEG", restart_marker_blocks=1),
    "restart markers in disorder": encode(PHOTO, "JPEG", restart_marker_blocks=1).replace(b"\xff\xd1", b"\xff\xd5"),
    "a flood of restart markers": JPEG[:-2] + b"\xff\xd0" * 500_000 + b"\xff\xd9",
    "extended sequential jpeg": JPEG.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11", 1),
    "arithmetic jpeg": ARITHMETIC,
    "lossless grey jpeg": lossless_jpeg(40, 30, 1),
    "lossless colour jpeg": lossless_jpeg(40, 30, 3),
    "half a jpeg with its end": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "profile of 4 MB": JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000)) * 60 + JPEG[2:],
    "exif that leads into itself": encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08"),
    "xmp orientation": encode(PHOTO, "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    "interlaced png": png(2, 2, b"\0\1\2\3" + b"\0\4\5\6" + b"\0\7\x08\x09\x0a\x0b\x0c", interlaced=1),
    "palette without transparency": encode(PHOTO.quantize(64), "PNG"),
    "2-bit palette": encode(PHOTO.quantize(4), "PNG", bits=2),
    "2-bit grey": png(8, 1, b"\0\x1b\xe4", depth=2, colour=0),
    "16-bit grey and alpha": png(2, 1, b"\0" + struct.pack(">4H", 0x8000, 0xFFFF, 0x100, 0), depth=16, colour=4),
    "16-bit rgba": png(1, 1, b"\0" + struct.pack(">4H", 0x8000, 1, 0xFFFF, 0), depth=16, colour=6),
    "chunks of one byte": PNG[:33] + b"".join(png_chunk(b"IDAT", bytes([b])) for b in zlib.compress(ROWS)) + PNG[-12:],
    "png without its end": PNG[:-12],
    "black png": png(40, 7, BLACK_PNG_ROWS),
    "png whose last rows are black": png(160, 120, ROWS[: 481 * 60] + bytes(481 * 60)),
    "all zeros in a huge stream": png(40, 7, bytes(50 << 20)),
    "gif frame beside its screen": gif(4, 4, gif_frame(6, 6, 1, 1)),
    "gif frame smaller than its screen": gif(40, 40, gif_frame(20, 20, 1, 1)),
    "100,000 gif frames": gif(1, 1, gif_frame(0, 0, 1, 1) * 100_000),
    "webp with alpha": encode(PHOTO.convert("RGBA"), "WEBP", lossless=True),
    "webp frame smaller than its canvas": webp_on_a_canvas(400, 300),
    "bmp from top to bottom": BMP[:22] + struct.pack("<i", -120) + BMP[26:],
    "bmp with run lengths": rle_bmp(40, 7, WHITE_RLE),
    "cmyk tiff": encode(PHOTO.convert("CMYK"), "TIFF"),
    "lab tiff": encode(Image.frombytes("LAB", (2, 2), bytes(range(90, 102))), "TIFF"),
    "ycbcr tiff": encode(PHOTO.convert("YCbCr"), "TIFF"),
    "palette tiff": encode(PHOTO.convert("P"), "TIFF"),
    "1-bit tiff": encode(PHOTO.convert("1"), "TIFF"),
    "fax tiff": encode(PHOTO.convert("1"), "TIFF", compression="group4"),
    "jpeg in tiff": encode(PHOTO, "TIFF", compression="jpeg"),
    "deflated tiff": encode(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "bigtiff": encode(PHOTO, "TIFF", big_tiff=True),
    "tiff of several pages": encode(PHOTO, "TIFF", save_all=True, append_images=[photo(160, 120, 1).copy()] * 20),
    "tiff with a strip that claims more rows": grey_tiff(4, 4, [bytes(range(16))], 2**31 - 1),
    "animated avif": encode(PHOTO, "AVIF", save_all=True, append_images=[photo(160, 120, 1).copy()]),
    "avif that claims another size": encode(PHOTO, "AVIF").replace(
        b"ispe\0\0\0\0" + struct.pack(">II", 160, 120), b"ispe\0\0\0\0" + struct.pack(">II", 320, 240)
    ),
}


@pytest.mark.parametrize("name", READ_AS_PILLOW)
def test_odd_but_readable(name: str) -> None:
    assert_read_as_pillow(READ_AS_PILLOW[name])


def test_sixteen_bit_grey_tiff_that_begins_with_white() -> None:
    """Pillow turns it round where it has 8 bits, and forgets to where it has 16."""
    values = np.arange(0, 65536, 1024, dtype="<u2")
    sixteen = grey_tiff(8, 8, [values.tobytes()], 8, bits=16, photometric=0)
    eight = grey_tiff(8, 8, [(values >> 8).astype(np.uint8).tobytes()], 8, photometric=0)
    expected = 255 - (values >> 8).reshape(8, 8)
    for data in (sixteen, eight):
        for pixels in both(data, WHOLE):
            np.testing.assert_array_equal(pixels.array[:, :, 1], expected)


def test_sixteen_bit_colour_tiff() -> None:
    values = np.arange(12, dtype="<u2") * 5000
    entries: list[tuple[int, int, Any]] = [(256, 4, 2), (257, 4, 2), (258, 3, [16, 16, 16]), (259, 3, 1), (262, 3, 2)]
    for order, stored in (("<", values), (">", values.astype(">u2"))):
        data = tiff([*entries, (273, 4, 8), (277, 3, 3), (278, 4, 2), (279, 4, 24)], stored.tobytes(), order)
        for pixels in both(data, WHOLE):
            np.testing.assert_array_equal(pixels.array, (values >> 8).reshape(2, 2, 3))


# --- refused ---

ZTXT_BOMB = b"k\0\0" + zlib.compress(bytes(20 << 20))
STRIPS = [bytes(range(40)) * 2 for _ in range(6)]

REFUSED = {
    "bytes of an icon": (b"\0\0\1\0" + bytes(50), "unsupported_format"),
    "big-endian bigtiff": (b"MM\0\x2b\0\x08\0\0" + bytes(50), "unsupported_format"),
    "1 x 10,000": (encode(Image.new("RGB", (1, 10_000)), "JPEG"), "too_large"),
    "2 x 60,000": (encode(Image.new("RGB", (2, 60_000)), "PNG"), "too_large"),
    "65,500 x 1": (encode(Image.new("RGB", (65_500, 1)), "JPEG"), "too_large"),
    "the largest png header": (png(2**31 - 1, 2**31 - 1, b""), "too_large"),
    "the largest tiff header": (grey_tiff(2**32 - 1, 2**32 - 1, [b"x"], 1), "too_large"),
    "bmp of 2 billion rows": (BMP[:22] + struct.pack("<i", -(2**31)) + BMP[26:], "too_large"),
    "gif frame larger than its screen": (gif(1, 1, gif_frame(0, 0, 65_535, 65_535)), "too_large"),
    "gif frame far beside its screen": (gif(1, 1, gif_frame(60_000, 60_000, 1, 1)), "too_large"),
    "huge webp canvas": (webp_on_a_canvas(16_383, 16_383), "too_large"),
    "absurd webp canvas": (webp_on_a_canvas(2**24, 1), "corrupt"),
    "second frame header is huge": (
        JPEG[:FRAME] + resized_frame(8, 8) + resized_frame(65_000, 65_000) + JPEG[FRAME + 19 :],
        "too_large",
    ),
    "first frame header is huge": (JPEG[:FRAME] + resized_frame(65_000, 65_000) + JPEG[FRAME:], "corrupt"),
    "jpeg that names no height": (JPEG[:FRAME] + resized_frame(160, 0) + JPEG[FRAME + 19 :], "corrupt"),
    "scans without end": (many_scans(1000, 1000, 100_000), "too_large"),
    "scans of a large picture": (many_scans(7000, 7000, 60), "too_large"),
    "baseline scans without end": (
        JPEG[:SCAN] + segment(0xDA, b"\1\1\0\0\x3f\0") * 200_000 + b"\xff\xd9",
        "too_large",
    ),
    "a flood of jpeg segments": (JPEG[:2] + b"\xff\xe5\0\2" * 200_000 + JPEG[2:], "too_large"),
    "a flood of jpeg filling": (JPEG[:2] + b"\xff" * 300_000 + JPEG[2:], "too_large"),
    "a flood of png chunks": (PNG[:33] + png_chunk(b"teXt", b"") * 120_000 + PNG[33:], "too_large"),
    "a flood of png chunks behind": (PNG[:-12] + png_chunk(b"teXt", b"") * 120_000 + PNG[-12:], "too_large"),
    "a flood of gif comments": (gif(1, 1, b"\x21\xfe\1a\0" * 80_000, gif_frame(0, 0, 1, 1)), "too_large"),
    "bmp run lengths without end": (rle_bmp(1000, 1000, b"\0\0" * 50_000), "corrupt"),
    "compressed text bomb": (png(1, 1, bytes(4), extra=png_chunk(b"zTXt", ZTXT_BOMB)), "too_large"),
    "international text bomb": (
        png(1, 1, bytes(4), extra=png_chunk(b"iTXt", b"k\0\1\0\0\0" + ZTXT_BOMB[3:])),
        "too_large",
    ),
    "colour profile bomb": (png(1, 1, bytes(4), extra=png_chunk(b"iCCP", ZTXT_BOMB)), "too_large"),
    "many texts": (
        png(1, 1, bytes(4), extra=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 19))) * 200),
        "too_large",
    ),
    "huge tiff tiles": (tiled_tiff(2**16, 2**14), "too_large"),
    "huge tiff tiles, of a type that libtiff reads": (tiled_tiff(2**16, 2**14, kind=17), "corrupt"),
    "tiff of 65,535 samples": (
        grey_tiff(4, 4, [bytes(16)], 4).replace(
            struct.pack("<HHIHH", 277, 3, 1, 1, 0), b"\x15\1\3\0\1\0\0\0\xff\xff\0\0"
        ),
        "corrupt",
    ),
    "tiff without pixels": (grey_tiff(0, 0, [bytes(16)], 4), "corrupt"),
    "tiff without some strips": (grey_tiff(40, 120, STRIPS[:3], 2), "truncated"),
    "tiff without some compressed strips": (
        grey_tiff(40, 12, [zlib.compress(s) for s in STRIPS[:3]], 2, compression=8),
        "corrupt",
    ),
    "png that ends half way": (png(160, 120, ROWS[: 481 * 60]), "truncated"),
    "png without its last row": (png(160, 120, ROWS[:-481]), "truncated"),
    "png without rows": (png(160, 120, b""), "truncated"),
    "black png without its last row": (png(40, 7, BLACK_PNG_ROWS[:-121]), "truncated"),
    "png without image data": (PNG[:33] + PNG[-12:], "corrupt"),
    "palette png without a palette": (png(4, 1, b"\0\0\1\2\3", colour=3), "corrupt"),
    "png that does not begin with its header": (PNG[:8] + png_chunk(b"teXt", b"a\0b") + PNG[8:], "corrupt"),
    "gif without frames": (gif(4, 4), "truncated"),
    "gif of too few pixels": (gif(40, 40, gif_frame(0, 0, 40, 40)), "truncated"),
    "jpeg without a scan": (JPEG[:SCAN] + b"\xff\xd9", "corrupt"),
    "jpeg of two components": (
        JPEG[:FRAME] + segment(0xC0, b"\x08\0\x78\0\xa0\2\1\x11\0\2\x11\0") + JPEG[FRAME + 19 :],
        "unsupported_mode",
    ),
    "hierarchical jpeg": (JPEG.replace(b"\xff\xc0\0\x11", b"\xff\xc5\0\x11", 1), "corrupt"),
    "float colour tiff": (
        tiff(one_pixel_tags([32] * 3, photometric=2, sample_format=[3] * 3), bytes(12)),
        "unsupported_mode",
    ),
    "signed 16-bit tiff": (tiff(one_pixel_tags(16, sample_format=2), bytes(2)), "unsupported_mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_odd_and_refused(name: str) -> None:
    data, error = REFUSED[name]
    begin = time.process_time()
    assert verdicts(data, Transform()) == (error, error)
    assert time.process_time() - begin < 3


def test_run_lengths_are_read_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    data = READ_AS_PILLOW["bmp with run lengths"]
    monkeypatch.setattr(guards, "MAX_RUNS", 28)
    assert verdicts(data) == ("", "")
    monkeypatch.setattr(guards, "MAX_RUNS", 20)
    assert verdicts(data) == ("too_large", "too_large")


# --- cut off anywhere ---

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_cut_off_anywhere_is_refused_or_whole(kind: str) -> None:
    """Never a part of it, with the rest black."""
    data = encode(photo(60, 45), kind)
    whole = decode(data, WHOLE, MAX_PIXELS).array
    for cut in {*range(0, len(data), max(1, len(data) // 120)), *range(len(data) - 20, len(data))}:
        for mode in ("fast", "reference"):
            try:
                pixels = decode(data[:cut], WHOLE.model_copy(update={"decode": mode}), MAX_PIXELS)
            except Reject as reject:
                assert reject.error in ("empty", "not_an_image", "truncated", "corrupt"), (cut, reject.error)
            else:
                np.testing.assert_array_equal(pixels.array, whole, err_msg=f"cut at {cut}")


# --- what it costs ---


def test_memory_follows_the_limit_on_pixels() -> None:
    """No more than 26 bytes for each pixel stored or resized, in any format, and next to none for what is refused."""
    side = 1200
    large = Image.new("RGB", (side, side), (9, 99, 200))
    grey = Image.fromarray(np.zeros((side, side), np.uint16))
    read = [encode(large, kind) for kind in FORMATS] + [encode(large.convert("CMYK"), "JPEG"), encode(grey, "PNG")]
    read += [encode(large.convert("RGBA"), kind) for kind in ("PNG", "WEBP")]
    read += [encode(large, "JPEG", progressive=True, subsampling=0), encode(large, "TIFF", compression="jpeg")]
    refused = [data for data, _ in REFUSED.values() if len(data) < 500_000]
    script = """
        import pickle, sys
        from pathlib import Path
        from pipeline.config import Transform
        from pipeline.errors import Reject
        from pipeline.inputs.images import decode

        def memory(what):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

        def cost(data, transform):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = memory("VmRSS")
            try:
                decode(data, transform, 50_000_000)
            except Reject:
                pass
            return memory("VmHWM") - before

        read, refused, pixels = pickle.load(sys.stdin.buffer)
        ways = [Transform(crop=None), Transform(resize=1190, crop=None, decode="reference")]
        worst = max(cost(data, way) / pixels for data in read for way in ways)
        refusal = max(cost(data, way) for data in refused for way in ways)
        print(f"\\n{worst} {refusal}")
    """
    bytes_per_pixel, refusal = map(float, run_worker(script, (read, refused, side * side)).splitlines()[-1].split())
    assert bytes_per_pixel < 26.5
    assert refusal < 20 * 2**20


def test_the_first_look_at_scans_may_find_too_many() -> None:
    """Those of a thumbnail, of a second picture and of a film behind it don't count."""
    thumbnail = encode(photo(16, 12), "JPEG", progressive=True)
    data = encode(PHOTO, "JPEG", progressive=True)
    data = data[:2] + segment(0xE1, b"Exif\0\0" + thumbnail * 20) + data[2:] + thumbnail * 1000 + b"\xff\xda" * 1000
    assert guards._scans(data) == 10
    limit = 10 * 160 * 120 // guards.MAX_SCANS
    image = Image.open(io.BytesIO(data))
    assert isinstance(image, Image.Image)
    guards.check_effort(data, image, limit)  # type: ignore[arg-type]
    with pytest.raises(Reject, match="it has 10 scans"):
        guards.check_effort(data, image, limit - 1)  # type: ignore[arg-type]
