"""Real image bytes, damaged at random and decoded in a process of their own, so that a crash would be seen.

`python -m tests.support.mutations 100000 1` decodes 100,000 damaged images from seed 1, in both modes, and prints what
became of them as JSON. `damaged(number)` makes any one of them again.
"""

from __future__ import annotations

import importlib
import io
import json
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Transform
from pipeline.error_classes import ERROR_CLASSES
from pipeline.errors import Reject
from pipeline.inputs import heif, images

REPOSITORY = Path(__file__).parents[2]
MAX_PIXELS = 1_000_000
TRANSFORM = Transform(resize=40, crop=32)
MAX_DIFFERENCE = 2  # levels, between the two modes
SLOW_S = 2.0  # of processor time, for one image of a few kB
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


@cache
def originals() -> list[tuple[str, bytes]]:
    """Format and bytes of images of eight formats, in the ways that they are written."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(np.asarray(load_sample_image("china.jpg"))).resize((120, 90))
    small, frames = photo.resize((60, 45)), {"save_all": True, "append_images": [photo.rotate(90).resize((60, 45))]}
    turned = Image.Exif()
    turned[0x0112] = 6
    found = [
        ("JPEG", photo, {"exif": turned, "icc_profile": b"no profile" * 9}),
        ("JPEG", photo, {"progressive": True, "subsampling": 0}),
        ("JPEG", photo.convert("L"), {"restart_marker_blocks": 3}),
        ("JPEG", photo.convert("CMYK"), {}),
        ("JPEG", photo.resize((400, 300)), {}),
        ("PNG", small, {"exif": turned}),
        ("PNG", small.convert("P"), {"transparency": 3}),
        ("PNG", small, frames),
        ("GIF", small, {}),
        ("GIF", small, frames),
        ("WEBP", photo, {"exif": turned}),
        ("WEBP", small.convert("RGBA"), {"lossless": True}),
        ("WEBP", small, frames),
        ("BMP", small, {}),
        ("BMP", small.convert("P"), {}),
        ("TIFF", small, {"exif": turned}),
        ("TIFF", small, {"compression": "tiff_lzw"}),
        ("TIFF", small, {"compression": "jpeg"}),
        ("TIFF", small.convert("1"), {"compression": "group4"}),
        ("AVIF", photo, {"exif": turned}),
        ("AVIF", small, frames),
        ("HEIF", photo, {"exif": turned}),
        ("HEIF", small.convert("RGBA"), frames),
        ("HEIF", photo, {"tile_size": 64}),
    ]
    heif.opener()  # so that Pillow writes it
    encoded = []
    for kind, image, options in found:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append((kind, buffer.getvalue()))
    return encoded


def damaged(number: int) -> tuple[str, bytes]:
    """The format and the bytes of the `number`-th damaged image: the formats in turn, and each in all its ways."""
    rng = random.Random(number)
    kinds = sorted({kind for kind, _ in originals()})
    kind = kinds[number % len(kinds)]
    data = bytearray(rng.choice([data for name, data in originals() if name == kind]))
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        rng.choice((_flip, _flip, _set, _set, _cut, _remove, _repeat, _splice))(data, rng)
    result = bytes(data)
    return kind, _with_right_checksums(result) if kind == "PNG" and rng.random() < 0.7 else result


def _place(data: bytearray, rng: random.Random) -> int:
    """Half of the changes fall into the header, where they do most."""
    return rng.randrange(max(1, min(len(data), rng.choice((600, len(data))))))


def _flip(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place : place + 1] = bytes(b ^ (1 << rng.randrange(8)) for b in data[place : place + 1])


def _set(data: bytearray, rng: random.Random) -> None:
    value, place = rng.choice((*INTERESTING, rng.getrandbits(32))), _place(data, rng)
    new = struct.pack(rng.choice(("<I", ">I")), value) if value > 0xFFFF or rng.random() < 0.3 else b""
    new = new or (struct.pack(rng.choice(("<H", ">H")), value) if value > 0xFF else bytes([value]))
    data[place : place + len(new)] = new


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.randrange(1, 40)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = data[place : place + rng.randrange(1, 40)] * rng.choice((1, 1, 50))


def _splice(data: bytearray, rng: random.Random) -> None:
    _, other = rng.choice(originals())
    place, begin = _place(data, rng), rng.randrange(len(other))
    data[place : place + rng.randrange(60)] = other[begin : begin + rng.randrange(1, 60)]


def _with_right_checksums(data: bytes) -> bytes:
    """Pillow looks no further where the checksum of a PNG's header is wrong."""
    out, at = bytearray(data[:8]), 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        out += data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


def check(data: bytes, decode: Callable[..., Any]) -> str:
    """What both modes make of some bytes: `read`, or the class of the error row. They must agree."""
    verdicts, found = [], []
    for mode in ("fast", "reference"):
        begin = time.process_time()
        try:
            pixels = decode(data, TRANSFORM.model_copy(update={"decode": mode}), MAX_PIXELS)
        except Reject as reject:
            assert (reject.stage, reject.error in ERROR_CLASSES, bool(reject.message)) == ("decode", True, True)
            verdicts.append(reject.error)
        else:
            assert (pixels.array.shape, pixels.array.dtype) == ((32, 32, 3), np.uint8)
            assert 0 < pixels.width * pixels.height <= MAX_PIXELS
            found.append(pixels)
            verdicts.append("read")
        assert time.process_time() - begin < SLOW_S, f"{time.process_time() - begin:.1f} s"
    assert verdicts[0] == verdicts[1], verdicts
    if found:
        assert (found[0].width, found[0].height) == (found[1].width, found[1].height)
        scaled = min(found[0].width, found[0].height) >= 4 * 40  # by the JPEG decoder, which differs by more
        difference = 0 if scaled else np.abs(found[0].array.astype(int) - found[1].array).max()
        assert difference <= MAX_DIFFERENCE, f"{difference} levels"
    return verdicts[0]


def decode_damaged(count: int, first: int, decode: str = "pipeline.inputs.images:decode") -> dict[str, Any]:
    """Decode `count` damaged images in a new process. Raises AssertionError that names the one it died of.

    Answers the verdicts by format, and the peak of its memory in MB beyond what it had before.
    """
    command = [sys.executable, "-m", "tests.support.mutations", str(count), str(first), decode]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    places = re.findall(r"^at (\d+)$", done.stderr, re.MULTILINE)
    assert done.returncode == 0, f"exit status {done.returncode} at damaged({places[-1:]}): {done.stderr[-3000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _peak_mb() -> float:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main(count: int, first: int, decode: str) -> None:
    module, _, name = decode.partition(":")
    function = getattr(importlib.import_module(module), name)
    for _, data in originals():
        assert check(data, images.decode) == "read"
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, verdicts = _peak_mb(), {kind: Counter[str]() for kind, _ in originals()}
    for number in range(first, first + count):
        sys.stderr.write(f"at {number}\n")
        kind, data = damaged(number)
        verdicts[kind][check(data, function)] += 1
    print(json.dumps({"verdicts": verdicts, "peak_mb": _peak_mb() - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or ["pipeline.inputs.images:decode"])[0])
