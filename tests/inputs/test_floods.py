"""Small files whose metadata would take minutes or gigabytes as soon as a header is read: refused, or passed over."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import Reject
from pipeline.inputs.images import decode
from tests.inputs.helpers import MAX_PIXELS, WHOLE, encode, photo

PHOTO = photo(160, 120)
JPEG = encode(PHOTO, "JPEG")


def tags(*entries: tuple[int, int, int], order: str = "<", is_big: bool = False, body: bytes = b"") -> bytes:
    """A TIFF's header and one directory of tags, types and counts, whose values all lie behind it."""
    head, number, entry = ("HHHQ", "Q", "HHQQ") if is_big else ("HI", "H", "HHII")
    at = struct.calcsize(f"{order}{head}") + 2
    behind = at + struct.calcsize(order + number) + len(entries) * struct.calcsize(order + entry)
    values = (43, 8, 0, at) if is_big else (42, at)
    found = b"II" if order == "<" else b"MM"
    found += struct.pack(order + head, *values) + struct.pack(order + number, len(entries))
    return found + b"".join(struct.pack(order + entry, *one, behind) for one in entries) + body


def exif(count: int) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0" + b"\0\0" if count == 1 else exif(1) * count


@pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize(("kind", "count"), [(4, 1_000_001), (3, 2**31), (5, 10_001), (10, 2**32 - 1)])
def test_a_tiff_with_millions_of_values_in_a_tag_is_refused(kind: int, count: int, order: str, is_big: bool) -> None:
    data = tags((256, 4, 1), (273, kind, count), order=order, is_big=is_big, body=bytes(1000))
    with pytest.raises(Reject, match=f"its tag 273 has {count} values") as caught:
        decode(data, WHOLE, MAX_PIXELS)
    assert caught.value.error == "too_large"


def test_bytes_may_be_as_many_as_they_are() -> None:
    """As a colour profile or a maker's note."""
    target = io.BytesIO()
    PHOTO.save(target, "TIFF", tiffinfo={34675: bytes(2_000_000)})
    np.testing.assert_array_equal(decode(target.getvalue(), WHOLE, MAX_PIXELS).array, np.asarray(PHOTO))


MANY = tags((0x0112, 5, 100_000), body=bytes(800_000))
TEXT = PngInfo()
TEXT.add_text("Raw profile type exif", f"\nexif\n{len(MANY)}\n{MANY.hex()}")


@pytest.mark.parametrize(
    "options",
    [*({"exif": b"Exif\0\0" * prefixes + MANY} for prefixes in range(4)), {"pnginfo": TEXT}],
    ids=["bare", "one prefix", "two", "three", "as text"],
)
def test_an_orientation_of_millions_of_fractions_is_none(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(PHOTO, "PNG", **options)
    monkeypatch.setattr(Image.Image, "getexif", lambda self: pytest.fail("it is unpacked"))
    np.testing.assert_array_equal(decode(data, WHOLE, MAX_PIXELS).array, np.asarray(PHOTO))


def test_exif_in_very_many_segments_is_refused() -> None:
    """Pillow joins them one by one: of 66,000 it took minutes."""
    with pytest.raises(Reject, match="it has 60000 segments of EXIF") as caught:
        decode(JPEG[:2] + exif(60_000) + JPEG[2:], WHOLE, MAX_PIXELS)
    assert caught.value.error == "too_large"


@pytest.mark.parametrize(
    "data",
    [JPEG[:2] + exif(50) + JPEG[2:], JPEG + exif(2000), JPEG[:2] + b"\xff\xe5\x30\x02" + exif(1024) + JPEG[2:]],
    ids=["some", "in a film behind it", "in another segment"],
)
def test_other_exif_is_not_counted(data: bytes) -> None:
    assert decode(data, WHOLE, MAX_PIXELS).array.shape == (120, 160, 3)


def test_the_scans_of_a_multi_picture_jpeg_are_counted() -> None:
    """Pillow has gone back to the beginning of these, so that the first scan is not where it stopped."""
    target = io.BytesIO()
    PHOTO.save(target, "MPO", save_all=True, append_images=[PHOTO])
    data = target.getvalue()
    assert decode(data, WHOLE, 160 * 120).array.shape == (120, 160, 3)
    at = data.index(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    with pytest.raises(Reject, match=r"it has \d+ scans"):
        decode(data[:at] + scan * 60 + data[at:] + b"\xff\xda\x00\x0c\x03" + bytes(9), WHOLE, 160 * 120)
