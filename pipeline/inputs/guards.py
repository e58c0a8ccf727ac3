"""What Pillow leaves unchecked: files that make it work or allocate without end, and files of which pixels are missing.

A header's size says little about either. A JPEG of 7 MB can hold 100,000 scans, each over the whole picture, and take
an hour; a TIFF of 64 x 64 pixels can claim one tile of 2 GiB; a PNG of 8,000 x 8,000 can end after its first row, and
the rest would come out black without a word.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import takewhile

from PIL import BmpImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from pipeline.error_classes import ErrorClass
from pipeline.errors import Reject

MAX_PIECES = 200_000  # that a parser may ask for: a fifth of a second; real files have some hundred
BYTES_PER_PIECE = 512  # so many more for a large file: pixels come in large pieces, endless metadata in small ones
MAX_RUNS = 10_000_000  # pieces of a BMP with run lengths, which Pillow reads byte by byte: two seconds
MAX_SCANS = 50  # over `max_pixels`, and the more of them the smaller the picture; 10 are usual
MAX_SEGMENTS = 100_000  # of a JPEG, when its scans or its EXIF are counted
MAX_EXIF = 100  # segments of a JPEG, which Pillow joins one by one
MAX_EXIF_TEXT = 2**20  # hexadecimal digits of EXIF that a PNG has as a text
MAX_VALUES = 1_000_000  # of a tag: Pillow makes objects of them; strips are far fewer
MAX_FRACTIONS = 10_000  # of a tag, which are larger objects
STEP_BYTES = 2**20

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # one that begins a segment, or ends it all
_TILE_TAGS = (322, 323)  # TIFF: width and length of a tile
_PLANAR, _SEPARATE = 284, 2
_EXIF = b"Exif\0\0"
_BYTES, _FRACTIONS = (1, 2, 6, 7), (5, 10)  # types of TIFF's values: kept as they are, and made of two numbers
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def rejected(error: ErrorClass, message: str) -> Reject:
    return Reject("decode", error, message)


class Pieces(io.BytesIO):
    """A file that may be read in a limited number of pieces.

    Pillow walks through metadata in Python, segment by segment, and keeps much of it: 8 MB of empty segments took
    it two seconds and 260 MB.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = MAX_PIECES + len(data) // BYTES_PER_PIECE

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise rejected("too_large", "it is cut into too many pieces")
        return super().read(size)


def check_metadata(data: bytes) -> None:
    """Raise Reject for metadata that would take minutes or gigabytes as soon as a header is read."""
    if data.startswith((b"II", b"MM")):
        check_values(data)
    elif data.startswith(b"\xff\xd8"):
        before_scans = takewhile(lambda segment: segment[0] != 0xDA, _segments(data))
        found = sum(kind == 0xE1 and data.startswith(_EXIF, at + 2) for kind, at in before_scans)
        if found > MAX_EXIF:
            raise rejected("too_large", f"it has {found} segments of EXIF")


def check_values(data: bytes) -> None:
    """Raise Reject for a TIFF, or EXIF, with a tag of so many values that an object for each would be too much."""
    begin = 0
    while data.startswith(_EXIF, begin):  # Pillow takes off two
        begin += len(_EXIF)
    for tag, kind, count in _tags(data[begin:]):
        if count > (MAX_FRACTIONS if kind in _FRACTIONS else MAX_VALUES) and kind not in _BYTES:
            raise rejected("too_large", f"its tag {tag} has {count} values")


def check_effort(data: bytes, image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Raise Reject for what would take minutes or gigabytes to read, though its size is within the limit."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        if _has_one_scan(data, image):
            return
        pixels, allowed = image.width * image.height, MAX_SCANS * max_pixels
        # The first count is quick, and may find too many: in a thumbnail, a second picture, a film behind it.
        if data.count(b"\xff\xda") * pixels > allowed and (scans := _scans(data)) * pixels > allowed:
            raise rejected("too_large", f"it has {scans} scans of {image.width} x {image.height} pixels")
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiles(data, image, max_pixels)
    elif isinstance(image, BmpImagePlugin.BmpImageFile) and isinstance(image.fp, Pieces):
        image.fp.left = MAX_RUNS


def check_header(data: bytes, image: ImageFile.ImageFile) -> None:
    """Raise Reject where pixels or their colours are missing, so that Pillow would leave them black."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        if data[12:16] != b"IHDR":
            raise rejected("corrupt", "it does not begin with its header")
        if image.mode == "P" and image.palette is None:
            raise rejected("corrupt", "it has no palette")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile and image.tile[0].codec_name != "libtiff":
        boxes = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        layers = len(image.getbands()) if image.tag_v2.get(_PLANAR) == _SEPARATE else 1
        if covered < image.width * image.height * layers:
            raise rejected("truncated", "some of its strips or tiles are missing")


def check_rows(data: bytes, image: ImageFile.ImageFile) -> None:
    """Raise Reject for a PNG, read already, whose compressed rows end too early."""
    if not isinstance(image, PngImagePlugin.PngImageFile):
        return
    width, height = image.size
    depth, colour, _, _, interlaced = data[24:29]
    if not interlaced and image.crop((0, height - 1, width, height)).tobytes().strip(b"\0"):
        return  # the last row is there, so all are
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    bits = depth * _CHANNELS[colour]
    expected = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    if not _inflates_to(data, expected):
        raise rejected("truncated", "its compressed rows end too early")


# --- JPEG ----------------------------------------------------------------------------------------------------------


def _has_one_scan(data: bytes, image: JpegImagePlugin.JpegImageFile) -> bool:
    """Whether the first scan holds all there is, as in most files, so that libjpeg looks for no other."""
    if image.info.get("progressive") or image.fp is None:
        return False
    length = 8 + 2 * image.layers  # of the segment that begins a scan of all components, behind which Pillow stopped
    begin = image.fp.tell() - length
    if begin < 0:  # Pillow has gone back to the beginning, as with several pictures in a file
        return False
    return data[begin : begin + 5] == bytes([0xFF, 0xDA, 0, length - 2, image.layers])


def _scans(data: bytes) -> int:
    """How often the first picture of a JPEG is gone over."""
    return sum(kind == 0xDA for kind, _ in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Kind and place of each segment of the first picture of a JPEG. Raises Reject for segments without end."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            return
        yield found[1][0], found.end()
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    raise rejected("too_large", f"it has more than {MAX_SEGMENTS} segments")


# --- TIFF ----------------------------------------------------------------------------------------------------------


def _check_tiles(data: bytes, image: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    """libtiff allocates a whole tile, however small the picture is."""
    for tag, kind, _ in _tags(data):
        # Of other types libtiff takes the value and Pillow doesn't, so that we would see no tile at all.
        if tag in _TILE_TAGS and (kind not in (3, 4, 16) or not isinstance(image.tag_v2.get(tag), int)):
            raise rejected("corrupt", "the size of its tiles is no plain number")
    width, length = (image.tag_v2.get(tag, 0) for tag in _TILE_TAGS)
    if width * length > max_pixels:
        raise rejected("too_large", f"its tiles have {width} x {length} pixels; input.max_pixels is {max_pixels}")


def _tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, type and number of values of each entry of the directory that describes the first picture."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] == b"\x2b\0"  # big-endian ones are refused before
    head, number, entry = ("8xQ", "Q", "HHQ8x") if is_big else ("4xI", "H", "HHI4x")
    try:
        (at,) = struct.unpack_from(order + head, data)
        (count,) = struct.unpack_from(order + number, data, at)
        at += struct.calcsize(order + number)
        for place in range(at, at + count * struct.calcsize(order + entry), struct.calcsize(order + entry)):
            yield struct.unpack_from(order + entry, data, place)
    except (struct.error, OverflowError):  # it ends before its directory does, which is for Pillow to say
        return


# --- PNG -----------------------------------------------------------------------------------------------------------


def _inflates_to(data: bytes, expected: int) -> bool:
    """Whether the image data of a PNG decompress to so many bytes at least. Holds a step of them at a time."""
    inflate = zlib.decompressobj()
    found = 0
    for body in _image_data(data):
        rest = body
        while rest and found < expected and not inflate.eof:
            try:
                found += len(inflate.decompress(rest, STEP_BYTES))
            except zlib.error:  # Pillow has read it all the same
                return found >= expected
            rest = inflate.unconsumed_tail
    return found >= expected


def _image_data(data: bytes) -> Iterator[bytes]:
    """The bodies of the IDAT chunks that follow each other, as Pillow reads them."""
    at, begun = 8, False
    while at + 8 <= len(data):
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if name == b"IDAT":
            begun = True
            yield data[at + 8 : at + 8 + length]
        elif begun:
            return
        at += length + 12
