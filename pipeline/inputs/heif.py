"""HEIC, as phones write it: read by pillow-heif where that is installed, which the extra `heic` asks for.

It is loaded when the first such image is met, so that other images and other processes pay nothing for it. AVIF has
the same container and is left to Pillow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import IO

from PIL import Image, ImageFile

from pipeline.error_classes import ErrorClass
from pipeline.errors import Reject
from pipeline.inputs.guards import Pieces, rejected

Opener = Callable[[IO[bytes], str], ImageFile.ImageFile]
Box = tuple[bytes, int, int]  # its name, and where its content begins and ends

MAX_WORK = 10  # times `max_pixels`: the picture and its tiles are twice its size, or some more with layers
MAX_DEPTH = 10  # of parts in parts: a layer made of a grid made of tiles has two

FORMAT = "HEIF"  # Pillow's name for it
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

# What libheif says, in the order in which to look for it: a limit may be named in words of the others.
_SAYS: tuple[tuple[re.Pattern[str], ErrorClass], ...] = (
    (re.compile(r"security limit|memory allocation", re.IGNORECASE), "too_large"),
    (re.compile(r"end of file|insufficient input|cannot read full|file size too small", re.IGNORECASE), "truncated"),
    (re.compile(r"unsupported (feature|file-?type|codec)|no decoding plugin", re.IGNORECASE), "unsupported_format"),
)
_SAYS_NOTHING = "not identified by this driver"  # Pillow, where libheif knows no way to read such pixels


def is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS and b"avif" not in data[8:64]


def opener() -> Opener:
    """What opens such an image. Raises Reject where pillow-heif is not installed."""
    found = _registered()
    if found is None:
        raise rejected(
            "unsupported_format",
            "this is HEIC, which takes `pip install pillow-heif` on every node",
        )
    return found


@cache
def _registered() -> Opener | None:
    try:
        import pillow_heif

        # A decode task owns one core; and what lies beside the picture isn't even looked at.
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    except ImportError:  # also where its library does not load
        return None
    return Image.OPEN[FORMAT][0]


def verdict(message: str) -> Reject | None:
    """What libheif's words tell; None where they don't."""
    if message == _SAYS_NOTHING:
        return rejected("unsupported_format", "its pixels are not coded as HEVC, which is all that is read of HEIF")
    return next((rejected(error, message) for said, error in _SAYS if said.search(message)), None)


# --- the container: boxes in boxes, each with its length and its name before it ------------------------------------


def check_parts(data: bytes, max_pixels: int) -> None:
    """Raise Reject where a part, such as a tile, a layer or a second picture, has too many pixels or is cut off.

    libheif decodes parts as the picture asks for them, also those beside it, again and again, and leaves tiles of
    which bytes are missing in one colour. The numbers of parts and of their pieces it has limited when this is called.
    """
    for name, begin, end in _boxes(data, 0, len(data)):
        if name != b"meta":
            continue
        meta = list(_boxes(data, begin + 4, end))  # behind version and flags
        sizes = dict(_sizes(data, meta))
        width, height = max(sizes.values(), key=lambda size: size[0] * size[1], default=(0, 0))
        if width * height > max_pixels:
            raise rejected("too_large", f"a part has {width} x {height} pixels; input.max_pixels is {max_pixels}")
        work = _work({part: width * height for part, (width, height) in sizes.items()}, _made_of(data, meta))
        if work > MAX_WORK * max_pixels:
            raise rejected("too_large", f"its parts have {work} pixels in all; input.max_pixels is {max_pixels}")
        if any(last > len(data) for last in _ends(data, meta)):
            raise rejected("truncated", "bytes of a part are missing")


class _Numbers:
    """The numbers in a box, one after the other; zeros behind its end. Raises Reject for very many."""

    def __init__(self, data: bytes, begin: int, end: int) -> None:
        self._pieces = Pieces(data[begin:end])

    def __call__(self, size: int) -> int:
        return int.from_bytes(self._pieces.read(size))


def _boxes(data: bytes, at: int, until: int) -> Iterator[Box]:
    """The boxes that stand side by side there."""
    while at + 8 <= until:
        length, header = int.from_bytes(data[at : at + 4]), 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16]), 16
        end = at + length if length else until  # 0: up to the end
        yield data[at + 4 : at + 8], at + header, min(end, until)
        if end < at + header:
            return
        at = end


def _sizes(data: bytes, meta: list[Box]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Width and height of each part. Of a part with several, which none should have, the largest counts."""
    inner = [box for name, begin, end in meta if name == b"iprp" for box in _boxes(data, begin, end)]
    properties = [box for name, begin, end in inner if name == b"ipco" for box in _boxes(data, begin, end)]
    found: dict[int, tuple[int, int]] = {}
    for name, begin, end in inner:
        if name != b"ipma":
            continue
        number = _Numbers(data, begin, end)
        version, flags = number(1), number(3)
        for _ in range(number(4)):
            part = number(4 if version else 2)
            for _ in range(number(1)):
                place = number(2) & 0x7FFF if flags & 1 else number(1) & 0x7F
                if 0 < place <= len(properties) and properties[place - 1][0] == b"ispe":
                    at = properties[place - 1][1] + 4
                    size = int.from_bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8])
                    found[part] = max(found.get(part, (0, 0)), size, key=lambda s: s[0] * s[1])
    yield from found.items()


def _made_of(data: bytes, meta: list[Box]) -> dict[int, list[int]]:
    """The parts that a part is made of, such as the tiles of a grid."""
    found: dict[int, list[int]] = {}
    for name, begin, end in meta:
        if name != b"iref":
            continue
        wide = 4 if data[begin : begin + 1] != b"\0" else 2
        for kind, first, last in _boxes(data, begin + 4, end):
            if kind == b"dimg":
                number = _Numbers(data, first, last)
                part = number(wide)
                found.setdefault(part, []).extend(number(wide) for _ in range(number(2)))
    return found


def _work(pixels: dict[int, int], made_of: dict[int, list[int]]) -> int:
    """How many pixels are decoded for the most costly part. Raises Reject for parts in parts without end."""
    known: dict[int, int] = {}

    def work(part: int, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise rejected("too_large", f"its parts are made of parts, more than {MAX_DEPTH} deep")
        if part not in known:
            known[part] = pixels.get(part, 0) + sum(work(inner, depth + 1) for inner in made_of.get(part, ()))
        return known[part]

    return max((work(part, 0) for part in made_of), default=0)


def _ends(data: bytes, meta: list[Box]) -> Iterator[int]:
    """Where in the file the bytes of each part end."""
    for name, begin, end in meta:
        if name != b"iloc":
            continue
        number = _Numbers(data, begin, end)
        version, _, sizes = number(1), number(3), number(2)
        offset, length, base, index = (sizes >> bits & 15 for bits in (12, 8, 4, 0))
        wide = 4 if version == 2 else 2
        for _ in range(number(wide)):
            number(wide)  # the part
            in_file = not version or number(2) & 15 == 0
            number(2)  # of another file
            place = number(base)
            for _ in range(number(2)):
                number(index if version else 0)
                last = place + number(offset) + number(length)
                if in_file:
                    yield last
