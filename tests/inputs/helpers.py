"""Photographs, their encodings, and the two modes side by side."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import skimage.data
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from pipeline.config import Transform
from pipeline.error_classes import ERROR_CLASSES
from pipeline.errors import Reject
from pipeline.inputs.images import Pixels, decode

MAX_PIXELS = 50_000_000
WHOLE = Transform(resize=None, crop=None)


@cache
def photo(width: int, height: int, which: int = 0) -> Image.Image:
    """A photograph squeezed into that size: no symmetry, plenty of detail."""
    sources = (
        lambda: load_sample_image("china.jpg"),
        lambda: load_sample_image("flower.jpg"),
        skimage.data.astronaut,
        skimage.data.coffee,
        skimage.data.rocket,
    )
    image = Image.fromarray(np.asarray(sources[which % len(sources)]()))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"", interlaced: int = 0
) -> bytes:
    """A PNG of these rows, each with its filter's number before it; `extra` chunks stand before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    body = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + png_chunk(b"IEND", b"")


def preset(data: bytes, transform: Transform) -> np.ndarray:
    """What torchvision makes of Pillow's upright image: the definition that `reference` must meet."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if transform.resize:
        image = F.resize(image, [transform.resize], InterpolationMode(transform.interpolation))
    if transform.crop:
        image = F.center_crop(image, [transform.crop])
    return np.asarray(image)


def both(data: bytes, transform: Transform, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, Pixels]:
    """The pixels in the fast and the reference mode."""
    modes = ({"decode": "fast"}, {"decode": "reference"})
    fast, reference = (decode(data, transform.model_copy(update=mode), max_pixels) for mode in modes)
    assert (fast.width, fast.height) == (reference.width, reference.height)
    for pixels in (fast, reference):
        assert pixels.array.dtype == np.uint8
        assert pixels.array.flags.c_contiguous
    return fast, reference


def verdict(data: bytes, transform: Transform, max_pixels: int) -> str:
    """The error class, "" for pixels."""
    try:
        decode(data, transform, max_pixels)
    except Reject as found:
        reject = found
    else:
        return ""
    assert reject.stage == "decode"
    assert reject.error in ERROR_CLASSES
    assert reject.message
    assert "0x" not in reject.message
    return reject.error


def verdicts(data: bytes, transform: Transform = WHOLE, max_pixels: int = MAX_PIXELS) -> tuple[str, str]:
    """The error classes in the fast and the reference mode."""
    slow = transform.model_copy(update={"decode": "reference"})
    return verdict(data, transform, max_pixels), verdict(data, slow, max_pixels)


def differences(fast: Pixels, reference: Pixels) -> np.ndarray:
    return np.abs(fast.array.astype(int) - reference.array)


def assert_read_as_pillow(data: bytes) -> None:
    """The reference mode gives Pillow's pixels, the fast one to within a level of them, as stored and resized."""
    fast, reference = both(data, WHOLE)
    np.testing.assert_array_equal(reference.array, preset(data, WHOLE))
    assert differences(fast, reference).max() <= 1
    assert differences(*both(data, Transform(resize=64, crop=56))).max() <= 1
