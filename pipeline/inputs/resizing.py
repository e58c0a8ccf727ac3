"""Pixels of any size to pixels of the size that the transform asks for, in one of two ways.

`two_steps` is the torchvision preset as it stands: turn upright, resize all of it with Pillow, cut out the centre.
`one_step` resizes the part that the crop keeps and nothing else, and turns the small result, the crop having been
mirrored beforehand. Two things keep it within a level of the other way. Side lengths and offsets are rounded
exactly as torchvision rounds them, then mapped back to source coordinates, which are not rounded at all. And rows
and columns are resized in the order in which Pillow takes them, because both round to whole levels in between.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import cykooz_resizer as rust
except ImportError:  # no wheel for this platform: Pillow has the same filters, at a third of the speed
    rust = None

Array = npt.NDArray[np.uint8]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # radius of the filters, in pixels of the coarser grid
_RUST_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
_RESIZER: Any = rust.Resizer() if rust else None


class Orientation(NamedTuple):
    """An EXIF orientation: transpose the stored pixels, then mirror the axes that result."""

    swap: bool
    mirror_x: bool
    mirror_y: bool


UPRIGHT = Orientation(False, False, False)
ORIENTATIONS: dict[Any, Orientation] = {
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


class Stored(NamedTuple):
    """Pixels as they lie in the file, uint8 (H, W, 3), and what turns them upright.

    `width` and `height` are the file's; the array is smaller by `shrink`, rounded up, where the JPEG was
    read at a fraction of its size.
    """

    array: Array
    width: int
    height: int
    orientation: Orientation = UPRIGHT
    shrink: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation.swap else (self.width, self.height)


class Axis(NamedTuple):
    """One side of a picture: resized from `length` to `resized` pixels, cut to `start:stop`, then zeros around."""

    length: int
    resized: int
    start: int
    stop: int
    before: int = 0
    after: int = 0

    def mirrored(self) -> Axis:
        return self._replace(start=self.resized - self.stop, stop=self.resized - self.start)

    def side(self, extent: float) -> Side:
        """What to resize to get `start:stop`, where the whole side is `extent` source pixels long."""
        size = self.stop - self.start
        return Side(self.start * extent / self.resized, self.stop * extent / self.resized, size)


class Side(NamedTuple):
    """An interval of source coordinates, in pixels, and the number of pixels that it becomes."""

    low: float
    high: float
    size: int

    def after(self, first: int) -> Side:
        """The same side where coordinates begin at `first`."""
        return self._replace(low=self.low - first, high=self.high - first)


def resized_size(width: int, height: int, resize: int | None) -> tuple[int, int]:
    """Width and height after resizing, rounded as torchvision does."""
    if resize is None:
        return width, height
    long = int(resize * max(width, height) / min(width, height))
    return (resize, long) if width <= height else (long, resize)


def axes(width: int, height: int, resize: int | None, crop: int | None) -> tuple[Axis, Axis]:
    """What becomes of each side of an upright picture."""
    resized_width, resized_height = resized_size(width, height, resize)
    return _axis(width, resized_width, crop), _axis(height, resized_height, crop)


def _axis(length: int, resized: int, crop: int | None) -> Axis:
    """Where torchvision's center_crop cuts or pads one side."""
    if crop is None or crop == resized:
        return Axis(length, resized, 0, resized)
    if crop > resized:
        return Axis(length, resized, 0, resized, (crop - resized) // 2, (crop - resized + 1) // 2)
    start = round((resized - crop) / 2.0)  # to the even neighbour, as in torchvision
    return Axis(length, resized, start, start + crop)


def _upright(array: Array, orientation: Orientation) -> Array:
    """A view."""
    if orientation.swap:
        array = array.transpose(1, 0, 2)
    return array[:: -1 if orientation.mirror_y else 1, :: -1 if orientation.mirror_x else 1]


def two_steps(stored: Stored, x: Axis, y: Axis, interpolation: str) -> Array:
    image = Image.fromarray(np.ascontiguousarray(_upright(stored.array, stored.orientation)))
    if image.size != (x.resized, y.resized):
        image = image.resize((x.resized, y.resized), _FILTERS[interpolation])
    return np.asarray(image)[y.start : y.stop, x.start : x.stop]


def one_step(stored: Stored, x: Axis, y: Axis, interpolation: str) -> Array:
    """Resize the part of the stored pixels that the crop keeps, then turn it."""
    orientation = stored.orientation
    across = x.mirrored() if orientation.mirror_x else x
    down = y.mirrored() if orientation.mirror_y else y
    if orientation.swap:
        across, down = down, across
    if (across.resized, down.resized) == (stored.width, stored.height):
        kept = stored.array[down.start : down.stop, across.start : across.stop]
    else:
        kept = (_resample_rust if rust else _resample_pillow)(
            stored.array,
            across.side(stored.width / stored.shrink),
            down.side(stored.height / stored.shrink),
            interpolation,
            _goes_across_first(x, y) != orientation.swap,
        )
    return _upright(kept, orientation)


def _goes_across_first(x: Axis, y: Axis) -> bool:
    """Whether Pillow resizes rows before columns. The order shows, since it rounds to whole levels in between."""
    return y.resized >= y.length or y.length - y.resized <= 2 * (x.length - x.resized)


def _resample_rust(array: Array, across: Side, down: Side, interpolation: str, across_first: bool) -> Array:
    """A part of uint8 (H, W, 3) resized, on one core with vector instructions. The result is read-only."""
    array, across, down = _reached(array, across, down, interpolation)
    height, width, _ = array.shape
    image = rust.ImageData(width, height, rust.PixelType.U8x3, array.tobytes())
    if across_first:  # the library by itself goes down first
        whole = Side(0, height, height)
        image, across = _rust_pass(image, across, whole, interpolation), Side(0, across.size, across.size)
    result = _rust_pass(image, across, down, interpolation)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(down.size, across.size, 3)


def _rust_pass(image: Any, across: Side, down: Side, interpolation: str) -> Any:
    result = rust.ImageData(across.size, down.size, rust.PixelType.U8x3)
    options = rust.ResizeOptions(
        resize_alg=rust.ResizeAlg.convolution(rust.FilterType[_RUST_FILTERS[interpolation]]),
        crop_box=rust.CropBox(across.low, down.low, across.high - across.low, down.high - down.low),
    )
    _RESIZER.resize(image, result, options)
    return result


def _resample_pillow(array: Array, across: Side, down: Side, interpolation: str, across_first: bool) -> Array:
    """The same, slower, where there is no Rust."""
    array, across, down = _reached(array, across, down, interpolation)
    height, width, _ = array.shape
    image = Image.fromarray(np.ascontiguousarray(array))
    filter_ = _FILTERS[interpolation]
    if across_first:
        image = image.resize((across.size, height), filter_, box=(across.low, 0, across.high, height))
        image = image.resize((across.size, down.size), filter_, box=(0, down.low, across.size, down.high))
    else:
        image = image.resize((width, down.size), filter_, box=(0, down.low, width, down.high))
        image = image.resize((across.size, down.size), filter_, box=(across.low, 0, across.high, down.size))
    return np.asarray(image)


def _reached(array: Array, across: Side, down: Side, interpolation: str) -> tuple[Array, Side, Side]:
    """Only what the filter reaches from these sides, so that nothing else is copied and resized."""
    (left, right), (top, bottom) = (_reach(side, interpolation) for side in (across, down))
    return array[top:bottom, left:right], across.after(left), down.after(top)


def _reach(side: Side, interpolation: str) -> tuple[int, int]:
    reach = _SUPPORT[interpolation] * max(1.0, (side.high - side.low) / side.size) + 1
    return max(0, int(side.low - reach)), math.ceil(side.high + reach)
