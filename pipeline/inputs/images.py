"""Bytes to pixels: open, check, read, resize, crop; whatever cannot be read becomes a `Reject` with a stable class.

`reference` is Pillow's reading and the torchvision preset, bit for bit: EXIF orientation applied, 16-bit grey
scaled to 8 bits, else `convert("RGB")`; the short side resized with Pillow's antialiasing filter; the centre cut out.
`fast` gives the same picture to within a level (two, for one value in a million). It differs in three places:

- JPEG is read by simplejpeg, in strict mode; whatever that refuses goes to Pillow, whose word is final;
- a JPEG of at least four times the resized size is read at 1/2, 1/4 or 1/8 of its size, and never at less than
  twice the resized size (this one differs by more than a level: docs/numerics.md);
- resizing and cropping are one step (resizing.py), by a vectorised library where there is one for the platform.

Both open the header with Pillow first and check it against the same limits, so they agree on what is an error.
Importing this module takes Pillow's own size limit away in this process, since `max_pixels` is the limit here,
and silences Pillow's warnings about odd metadata, which would otherwise be printed image after image.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import (  # noqa: F401 - importing a plugin registers its format
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.config import Transform
from pipeline.errors import Reject, clean
from pipeline.inputs import heif
from pipeline.inputs.guards import (
    MAX_EXIF_TEXT,
    Pieces,
    check_effort,
    check_header,
    check_metadata,
    check_rows,
    check_values,
    rejected,
)
from pipeline.inputs.resizing import (
    ORIENTATIONS,
    UPRIGHT,
    Array,
    Orientation,
    Stored,
    axes,
    one_step,
    resized_size,
    two_steps,
)

# Naming the formats keeps Ghostscript (EPS) and rarely used parsers away from untrusted bytes. HEIC is in heif.py.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")

Image.MAX_IMAGE_PIXELS = None
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a decode task owns one core, not the node
warnings.filterwarnings("ignore", module=r"PIL\.")
# Freed at once. From this glibc learns to keep blocks up to this size for the next image, where it would hand them
# back to the system and fault every page in again: a third less time where all images have one size.
np.empty(16 << 20, np.uint8)

# What else could be under an image's name, so that the message can say it.
_OTHER_FORMATS = (
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"%!PS", "EPS"),
    (b"MM\x00\x2b", "big-endian BigTIFF"),  # which Pillow takes for a plain TIFF, and reads other tags than libtiff
)

# Pillow tells these apart in its messages only.
_SAYS_TOO_LARGE = re.compile(r"too large|too much memory|exceeds limit", re.IGNORECASE)
_SAYS_TRUNCATED = re.compile(r"truncated|incomplete|requires a buffer|no more images", re.IGNORECASE)
_SAYS_MODE = re.compile(r"unknown pixel mode|conversion .*not supported|cannot handle \d+-(bit|layer)", re.IGNORECASE)


@dataclass(frozen=True)
class Pixels:
    """`array` is uint8 (H, W, 3), RGB, C-contiguous and perhaps read-only, after resize and crop.

    `width` and `height` are those of the upright original, in pixels.
    """

    array: Array
    width: int
    height: int


def decode(data: bytes, transform: Transform, max_pixels: int) -> Pixels:
    """The pixels of an encoded image after the transform's resize and crop (not its normalisation).

    The first image counts where there are several (animations, multi-picture files). `max_pixels` limits the
    image as stored and as resized. Raises Reject with stage `decode` and an error class of docs/errors.md;
    it raises nothing else for any bytes. (A MemoryError while resizing, within those limits, is the machine's.)
    """
    image = _checked(data, transform, max_pixels)
    # Nearest picks single pixels: a mirrored or scaled source would pick others, so it is always done literally.
    fast = transform.decode != "reference" and transform.interpolation != "nearest"
    stored = (_read_jpeg(data, image, transform.resize) if fast else None) or _read(data, image)
    width, height = stored.upright_size
    x, y = axes(width, height, transform.resize, transform.crop)
    array = (one_step if fast else two_steps)(stored, x, y, transform.interpolation)
    if x.before or x.after or y.before or y.after:
        array = np.pad(array, ((y.before, y.after), (x.before, x.after), (0, 0)))
    return Pixels(np.ascontiguousarray(array), width, height)


def encoded(data: bytes, transform: Transform, max_pixels: int) -> Pixels | None:
    """A JPEG's bytes in place of its pixels, where a device can decode them as well; None for anything else.

    Checked as `decode` does, and left to it where the end is missing: a device would fill up what it lacks.
    """
    image = _checked(data, transform, max_pixels)
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    if image.mode == "RGB" and (image.info.get("adobe_transform") == 0 or [one[0] for one in image.layer] == [*b"RGB"]):
        return None  # it has no YCbCr, for which a device may take it
    width, height = reversed(image.size) if _orientation(image).swap else image.size
    return Pixels(np.frombuffer(data, np.uint8).reshape(-1, 1), width, height)


def size_and_orientation(data: bytes) -> tuple[tuple[int, int], Orientation]:
    """Of a file that `encoded` has let pass: width and height as stored, and how it is turned upright."""
    image = _open(data)
    return image.size, _orientation(image)


def _checked(data: bytes, transform: Transform, max_pixels: int) -> ImageFile.ImageFile:
    """The image with its header read. Raises Reject where it goes beyond a limit."""
    image = _open(data)
    _check_size(image.size, transform.resize, max_pixels)
    check_effort(data, image, max_pixels)
    if image.format == heif.FORMAT:
        heif.check_parts(data, max_pixels)
    return image


def _check_size(size: tuple[int, int], resize: int | None, max_pixels: int) -> None:
    for (width, height), what in ((size, "it has"), (resized_size(*size, resize), "resized it would have")):
        if width * height > max_pixels:
            raise rejected("too_large", f"{what} {width} x {height} pixels; input.max_pixels is {max_pixels}")


# --- reading ---


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read and its pixels not. As Image.open, but it keeps the plugin's own words."""
    if not data:
        raise rejected("empty", "there are no bytes")
    if other := _other_format(data):
        raise rejected("unsupported_format", f"this is {other}; supported are {', '.join(FORMATS)}")
    check_metadata(data)
    if heif.is_heif(data):
        return _opened(heif.opener(), data)
    for format_ in FORMATS:
        factory, accept = Image.OPEN[format_]
        accepted = accept is None or accept(data[:16])
        if isinstance(accepted, str):  # this build of Pillow lacks the codec, and says so
            raise rejected("unsupported_format", accepted)
        if accepted:
            return _opened(factory, data)
    raise rejected("not_an_image", f"it starts with {data[:16]!r}, which is none of {', '.join(FORMATS)}")


def _opened(factory: Callable[..., ImageFile.ImageFile], data: bytes) -> ImageFile.ImageFile:
    try:
        return factory(Pieces(data), "")
    except Reject:
        raise
    except Exception as cause:  # parsers raise whatever the bytes lead them to
        raise _verdict(cause, data) from cause


def _other_format(data: bytes) -> str | None:
    return next((name for magic, name in _OTHER_FORMATS if data.startswith(magic)), None)


def _read(data: bytes, image: ImageFile.ImageFile) -> Stored:
    """Pillow's reading."""
    try:
        check_header(data, image)
        image.load()
        check_rows(data, image)
        array = _rgb(image)
    except Reject:
        raise
    except Exception as cause:  # as in _opened
        raise _verdict(cause, data) from cause
    return Stored(array, array.shape[1], array.shape[0], _orientation(image))


def _rgb(image: ImageFile.ImageFile) -> Array:
    """uint8 (H, W, 3). What `convert` would turn all white or all black is scaled, or refused."""
    if image.mode.startswith("I;16"):
        return np.repeat(eight_bits(image)[:, :, None], 3, axis=2)
    if image.mode in ("F", "I"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed integer"
        raise rejected("unsupported_mode", f"its pixels are {kind} numbers, whose black and white are not known")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def eight_bits(image: Image.Image) -> Array:
    """uint8 (H, W) of 9- to 16-bit grey."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    grey: Array = (np.asarray(image) >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero, which Pillow turns round for 8 bits, and not for 16
        grey = 255 - grey
    return grey


def _orientation(image: ImageFile.ImageFile) -> Orientation:
    """How EXIF or XMP says that the picture was held. Call it before reading a JPEG or after `load`."""
    if image.format == heif.FORMAT:
        return UPRIGHT  # libheif has turned it, as the container says, whose word counts there
    try:
        check_values(image.info.get("exif", b""))
        if len(image.info.get("Raw profile type exif", "")) > MAX_EXIF_TEXT:
            return UPRIGHT
        return ORIENTATIONS.get(image.getexif().get(0x0112), UPRIGHT)
    except Exception:  # noqa: BLE001 - broken metadata says nothing about the pixels, which are fine
        return UPRIGHT


def _read_jpeg(data: bytes, image: ImageFile.ImageFile, resize: int | None) -> Stored | None:
    """simplejpeg's reading; None where Pillow should decide."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    width, height = image.size
    shrink = _shrink(image.size, resized_size(width, height, resize))
    rows, columns = -(-height // shrink), -(-width // shrink)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):  # the limits were checked for Pillow's size
            return None
        array = simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns, strict=True)
    except Exception:  # noqa: BLE001 - nothing is lost: Pillow reads it, or gives the reason why not
        return None
    assert array.shape == (rows, columns, 3), f"asked for 1/{shrink} of {image.size}, got {array.shape}"
    return Stored(array, width, height, _orientation(image), shrink)


def _shrink(size: tuple[int, int], resized: tuple[int, int]) -> int:
    """The factor to read a JPEG smaller by. Only powers of two: libjpeg has no vector code for the others."""
    fits = (s for s in (8, 4, 2) if size[0] >= 2 * s * resized[0] and size[1] >= 2 * s * resized[1])
    return next(fits, 1)


# --- refusing ---


def _verdict(cause: Exception, data: bytes) -> Reject:
    """The error row for what Pillow raised.

    A MemoryError counts as `too_large`: the header has passed the limits, and a machine short of memory kills
    the process rather than refusing an allocation, so the file asked for something absurd inside.
    """
    message = clean(cause)
    if heif.is_heif(data) and (said := heif.verdict(message)):
        return said
    if isinstance(cause, MemoryError) or _SAYS_TOO_LARGE.search(message):
        return rejected("too_large", message)
    if _SAYS_MODE.search(message):
        return rejected("unsupported_mode", message)
    if _SAYS_TRUNCATED.search(message) or _is_cut(data):
        return rejected("truncated", message)
    return rejected("corrupt", message)


def _is_cut(data: bytes) -> bool:
    """Whether the header points behind the end, in the formats where Pillow's message doesn't tell."""
    if data.startswith(b"RIFF"):  # WEBP
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith((b"II*\0", b"MM\0*")):  # TIFF
        return int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big") >= len(data)
    if data[4:8] == b"ftyp":  # AVIF, HEIC: boxes, each beginning with its length, of which 0 and 1 mean something else
        end, length = 0, 8
        while length >= 8 and end < len(data):
            length = int.from_bytes(data[end : end + 4])
            end += length
        return end > len(data)
    return False
