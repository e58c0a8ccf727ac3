"""Images per CPU second from JPEG bytes to 224 x 224 pixels, and how far the pixels are from the reference.

    python -m benchmarks.images FOLDER [--rounds 5] [--large 8]

Every contender is a process of its own, as a decode worker is, with nothing imported that it does not need. In every
round each of them takes all images in turn, so that a machine that slows down slows all of them; the median round
counts. Only ratios carry over to another machine. The large images are the folder's first, enlarged to 12 megapixels.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import numpy as np

Decode = Callable[[bytes], np.ndarray]
MAX_PIXELS = 50_000_000
IMAGES: list[bytes] = []  # of a contender's process
DECODE: list[Decode] = []


def preset() -> Decode:
    """As the weights' documentation has it: open, resize to 256, crop to 224."""
    import torch
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    torch.set_num_threads(1)

    def decode(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(F.center_crop(F.resize(image, [256], InterpolationMode.BILINEAR), [224]))

    return decode


def reference() -> Decode:
    from pipeline.config import Transform
    from pipeline.inputs.images import decode

    return lambda data: decode(data, Transform(decode="reference"), MAX_PIXELS).array


def fast() -> Decode:
    from pipeline.config import Transform
    from pipeline.inputs.images import decode

    transform = Transform()
    return lambda data: decode(data, transform, MAX_PIXELS).array


def libjpeg() -> Decode:
    import simplejpeg

    decode: Decode = simplejpeg.decode_jpeg
    return decode


def libraries() -> Decode:
    """What no code of ours can leave out: Pillow's header, libjpeg, and the resizing, with all sizes known beforehand.

    It has no limits, no orientation and no answer to a broken file.
    """
    import cykooz_resizer as rust
    import simplejpeg
    from PIL import Image

    from pipeline.config import Transform
    from pipeline.inputs import images, resizing

    transform = Transform()

    def options(across: resizing.Side, down: resizing.Side) -> rust.ResizeOptions:
        return rust.ResizeOptions(
            rust.ResizeAlg.convolution(rust.FilterType.bilinear),
            crop_box=rust.CropBox(across.low, down.low, across.high - across.low, down.high - down.low),
        )

    @functools.cache
    def prepared(width: int, height: int) -> tuple:
        shrink = images._shrink((width, height), resizing.resized_size(width, height, transform.resize))
        x, y = resizing.axes(width, height, transform.resize, transform.crop)
        sides = x.side(width / shrink), y.side(height / shrink)
        size = -(-height // shrink), -(-width // shrink)
        (left, right), (top, bottom) = (resizing._reach(side, "bilinear") for side in sides)
        kept = slice(top, min(bottom, size[0])), slice(left, min(right, size[1]))
        across, down, rows = sides[0].after(left), sides[1].after(top), kept[0].stop - top
        if not resizing._goes_across_first(x, y):
            return size, kept, [(down.size, options(across, down))]
        first = options(across, resizing.Side(0, rows, rows))
        return size, kept, [(rows, first), (down.size, options(resizing.Side(0, across.size, across.size), down))]

    def decode(data: bytes) -> np.ndarray:
        (height, width), kept, passes = prepared(*Image.open(io.BytesIO(data)).size)
        array = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)[kept]
        image = rust.ImageData(array.shape[1], array.shape[0], rust.PixelType.U8x3, array.tobytes())
        for rows, option in passes:
            source, image = image, rust.ImageData(transform.crop, rows, rust.PixelType.U8x3)
            resizing._RESIZER.resize(source, image, option)
        return np.frombuffer(image.get_buffer(), np.uint8).reshape(transform.crop, transform.crop, 3)

    return decode


CONTENDERS = {
    "Pillow, then the preset": preset,
    "ours, reference": reference,
    "ours, fast": fast,
    "its libraries, nothing else": libraries,
    "libjpeg alone, full size": libjpeg,
}


def prepare(name: str, images: list[bytes]) -> None:
    IMAGES[:] = images
    DECODE[:] = [CONTENDERS[name]()]


def one_round() -> float:
    """Images per CPU second."""
    decode = DECODE[0]
    begun = time.process_time()
    for data in IMAGES:
        decode(data)
    return len(IMAGES) / (time.process_time() - begun)


def measure(images: list[bytes], rounds: int) -> dict[str, float]:
    """The median rate of every contender."""
    rates: list[dict[str, float]] = []
    with ExitStack() as stack:
        workers: dict[str, ProcessPoolExecutor] = {}
        for name in CONTENDERS:
            pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare, initargs=(name, images))
            workers[name] = stack.enter_context(pool)
        for _ in range(rounds + 1):
            rates.append({name: worker.submit(one_round).result() for name, worker in workers.items()})
    return {name: statistics.median(found[name] for found in rates[1:]) for name in CONTENDERS}  # the first warms up


def agreement(images: list[bytes], decode: Decode) -> tuple[float, int]:
    """Mean and greatest difference from the preset, in levels of 255."""
    expected = preset()
    found = [np.abs(decode(data).astype(int) - expected(data)) for data in images]
    return float(np.mean([f.mean() for f in found])), int(max(f.max() for f in found))


def report(title: str, images: list[bytes], rounds: int) -> None:
    kilobytes = statistics.mean(len(data) for data in images) / 1000
    print(f"{title}: {len(images)} images of {kilobytes:.0f} kB, {rounds} rounds")
    print(f"  {'':28}{'images/CPU s':>13}{'ratio':>8}{'mean diff':>12}{'max':>5}")
    rates = measure(images, rounds)
    for name, rate in rates.items():
        line = f"  {name:28}{rate:13.1f}{rate / rates['Pillow, then the preset']:8.2f}"
        if name.startswith("ours"):
            mean, greatest = agreement(images, CONTENDERS[name]())
            line += f"{mean:12.4f}{greatest:5d}"
        print(line, flush=True)


def enlarged(data: bytes) -> bytes:
    """12 megapixels, as a camera's JPEG."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = (12_000_000 / (image.width * image.height)) ** 0.5
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    from benchmarks.photographs import images_in, refuse_turned, refuse_unreadable  # not in the contenders' processes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=8, help="how many to enlarge (0: none)")
    options = parser.parse_args()
    listed = [(str(path), path.read_bytes()) for path in images_in(options.folder, (".jpg", ".jpeg"))]
    refuse_unreadable(listed)
    refuse_turned(listed)
    images = [data for _, data in listed]
    report("As they are", images, options.rounds)
    if options.large:
        report("12 megapixels", [enlarged(data) for data in images[: options.large]], options.rounds)


if __name__ == "__main__":
    main()
