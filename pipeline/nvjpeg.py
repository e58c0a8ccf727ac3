"""JPEGs that a GPU decodes, resizes and crops, where it has few cores beside it: `model.transform.decode: nvjpeg`.

Decoders then only look at a JPEG's header, check it as ever, and let its bytes travel in place of pixels; the actor has
them decoded here before it predicts. What nvJPEG does not read, a core reads as with `decode: fast`, whose word is
final: so what is an error row stays the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.config import Transform
from pipeline.errors import ConfigError, Reject, clean
from pipeline.inputs.images import Pixels, decode, size_and_orientation
from pipeline.inputs.resizing import Array, axes
from pipeline.inputs.stream import pixels_table
from pipeline.model.engines import OutOfMemory
from pipeline.rows import Kind, Row

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_PIXELS = 2**26  # decoded at once, 3 bytes each; a single image may have more
MODES = ("bilinear", "bicubic")  # that torch has with antialiasing


def device_decoder(transform: Transform, max_pixels: int, device: str) -> DeviceDecoder | None:
    """What decodes on `device` (cpu or cuda), if the transform asks for that. Raises ConfigError where it can't be."""
    if transform.decode != "nvjpeg":
        return None
    if device != "cuda":
        raise ConfigError(
            f"model.transform.decode: nvjpeg needs a GPU, but predictions are made on the {device} here. Use fast."
        )
    if transform.interpolation not in MODES:
        raise ConfigError(
            f"model.transform.decode: nvjpeg resizes {' or '.join(MODES)}, not {transform.interpolation}. Use fast."
        )
    return DeviceDecoder(transform, max_pixels)


@dataclass(frozen=True)
class DeviceDecoder:
    """PIXELS tables with ENCODED rows to tables without: each becomes a sample with pixels, or an error row.

    Imports torch when it is called. Several threads may call it at once.
    """

    transform: Transform
    max_pixels: int
    device: str = "cuda"

    def __call__(self, block: pa.Table) -> pa.Table:
        is_encoded = block["kind"].to_numpy() == Kind.ENCODED
        if not is_encoded.any():
            return block
        others, encoded = block.filter(pa.array(~is_encoded)), block.filter(pa.array(is_encoded))
        rows = [
            Row(item["shard"], Kind.SAMPLE, item["index"], item["key"], data.as_py())
            for item, data in zip(encoded.select(["shard", "index", "key"]).to_pylist(), encoded["pixels"], strict=True)
        ]
        sizes = encoded["width"].to_numpy().astype(np.int64) * encoded["height"].to_numpy()
        found: list[tuple[Row, Pixels | Reject]] = []
        for part in _parts(sizes):
            images = [row.data or b"" for row in rows[part]]
            found += zip(rows[part], self._read(images), strict=True)
        return pa.concat_tables([others, pixels_table(found)])

    def _read(self, images: Sequence[bytes]) -> list[Pixels | Reject]:
        """Together if that works. Else in halves: torchvision says of several images only that one of them failed, and
        where they are too much for the device's memory, half of them may fit."""
        import torch

        from pipeline.model.torch_engine import memory_errors

        try:
            with memory_errors():
                return self._read_on_device(images)
        except torch.AcceleratorError:  # after which nothing goes well in this process
            raise
        except (RuntimeError, OutOfMemory) as cause:  # torch's for what nvJPEG refuses, and for memory
            reason = clean(cause).split(".")[0]
        # Not above, where the error would keep what the device holds of these images.
        if len(images) > 1:
            half = len(images) // 2
            return self._read(images[:half]) + self._read(images[half:])
        _announce(reason)
        return [self._read_on_core(images[0])]

    def _read_on_core(self, data: bytes) -> Pixels | Reject:
        try:
            return decode(data, self.transform, self.max_pixels)
        except Reject as reject:
            return reject

    def _read_on_device(self, images: Sequence[bytes]) -> list[Pixels | Reject]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
        with torch.inference_mode(), _own_stream(self.device):
            decoded = decode_jpeg(encoded, ImageReadMode.RGB, device=self.device)
            pictures = [_upright(picture, data) for picture, data in zip(decoded, images, strict=True)]
            arrays = iter(_on_host([_transformed(one, self.transform) for one in pictures if one is not None]))
        found: list[Pixels | Reject] = []
        for picture, data in zip(pictures, images, strict=True):
            if picture is None:  # the limits were checked with what its header says
                _announce("it has another size there than its header says")
                found.append(self._read_on_core(data))
            else:
                found.append(Pixels(next(arrays), width=picture.shape[2], height=picture.shape[1]))
        return found


_streams = threading.local()


@contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """A stream for each thread that decodes, on which nothing is under way.

    decode_jpeg writes on a stream of its own, and waits for nobody: not for kernels that still read memory of this
    thread's stream that was freed and is given out again. No other thread is given it, since torch keeps the memory of
    a stream for that stream.
    """
    import torch

    if device != "cuda":
        yield
        return
    if not hasattr(_streams, "own"):
        _streams.own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_streams.own):
        _streams.own.synchronize()
        yield


@cache
def _announce(reason: str) -> None:
    """Once in a process for each reason: where every image is refused, the GPU only costs time."""
    log.warning("decode: nvjpeg: an image that the GPU does not decode is decoded by a core (%s)", reason)


def _parts(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive images of some MAX_PIXELS in all."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > MAX_PIXELS:
            yield slice(start, place)
            start, total = place, 0
        total += size
    yield slice(start, len(sizes))


def _upright(picture: Tensor, data: bytes) -> Tensor | None:
    """uint8 (3, H, W), as the camera was held; None where it has not the size that the header of its JPEG says."""
    (width, height), orientation = size_and_orientation(data)
    if picture.shape[1:] != (height, width):
        return None
    picture = picture.transpose(1, 2) if orientation.swap else picture
    mirrored = [axis for axis, mirror in ((1, orientation.mirror_y), (2, orientation.mirror_x)) if mirror]
    return picture.flip(mirrored) if mirrored else picture


def _transformed(picture: Tensor, transform: Transform) -> Tensor:
    """uint8 (3, H, W) to uint8 (H, W, 3): the short side resized with antialiasing, the centre cut out."""
    from torch.nn.functional import interpolate, pad

    x, y = axes(picture.shape[2], picture.shape[1], transform.resize, transform.crop)
    if (y.resized, x.resized) != tuple(picture.shape[1:]):
        resized = interpolate(
            picture[None].float(), (y.resized, x.resized), mode=transform.interpolation, antialias=True
        )
        picture = resized[0].round().clamp(0, 255).byte()
    picture = picture[:, y.start : y.stop, x.start : x.stop]
    return pad(picture, (x.before, x.after, y.before, y.after)).permute(1, 2, 0)


def _on_host(pictures: Sequence[Tensor]) -> Sequence[Array]:
    """In one copy where all have one size."""
    import torch

    if len({picture.shape for picture in pictures}) == 1:
        return list(torch.stack(list(pictures)).cpu().numpy())
    return [picture.contiguous().cpu().numpy() for picture in pictures]
