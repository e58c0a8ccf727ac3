"""How many images at once: the knee of the throughput curve, measured on the device in seconds, kept by its node."""

from __future__ import annotations

import gc
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import digest
from pipeline.model.cache import keep, recall
from pipeline.model.engines import ROWS, Engine, OutOfMemory, PixelBatch, load_engine, num_cores
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.zoo import cache_key

log = logging.getLogger(__name__)

CANDIDATES = {"cpu": (8, 32), "cuda": (32, 64, 128, 256, 512)}  # images
UNMEASURED = {"cpu": 32, "cuda": 256}  # where nothing is computed
OWN_SIZES = {"cpu": 1, "cuda": 16}  # where images have their own sizes: see `images_at_once`
USUAL_PIXELS = 224 * 224
MOST_OF_ONE_SIZE = 64  # tiny images that share a batch
ENOUGH = 0.97  # of the best rate: beyond that a larger batch costs memory and latency for nothing
SECONDS = 0.4  # for each candidate
LONGEST = 0.5  # seconds that a batch may take: what a call costs besides its images is nothing to that
MEMORY = 0.5  # of the device's; the rest is for what else lives there, and for fragments


def choose_batch_size(spec: ModelSpec, info: ModelInfo, engine: str, device: str) -> int:
    """The smallest batch that is about as fast as any, in images. What this node found before, it does not measure
    again; a network that can change unseen is measured in every run."""
    known = remembered_batch_size(spec, engine, device)
    if known is not None:
        return known
    curve = dict(_curve(spec, info, engine, device))
    chosen = knee(curve, candidates(device, spec.input_size or 224)[0])
    found = {"batch_size": chosen, "images_per_s": {size: round(rate, 1) for size, rate in curve.items()}}
    log.info("runtime.batch_size: %s", found)
    keep("batch-sizes", _key(spec, engine, device), found)
    return chosen


def remembered_batch_size(spec: ModelSpec, engine: str, device: str) -> int | None:
    """What `choose_batch_size` returns where it need not measure; None where it must."""
    if engine == "noop":
        return UNMEASURED[device]
    if spec.input_size is None:
        return OWN_SIZES[device]
    found = recall("batch-sizes", _key(spec, engine, device))
    return found and int(found["batch_size"])


def _key(spec: ModelSpec, engine: str, device: str) -> str | None:
    key = cache_key(spec, "torch", "openvino") if engine == "openvino" else cache_key(spec, "torch")
    return key and digest([key, engine, _hardware(device)], 32)


def images_at_once(batch_size: int, height: int, width: int) -> int:
    """How many images of this size make a batch where they come in sizes of their own: at the most as many pixels as
    `batch_size` images of 224 x 224 have, but at least one image.

    What pads a batch takes as long as images do, and images of many sizes fill none. Like this it takes no longer than
    those pixels, and photographs on a CPU, which computes one of them about as fast as many, need none, while tiny
    images, which are many times as fast together, share a batch. No row depends on its neighbours: only sizes count.
    """
    images = min(max(batch_size * USUAL_PIXELS // (height * width), 1), max(batch_size, MOST_OF_ONE_SIZE))
    return next(step * (images // step) for step in (ROWS, ROWS // 2, 1) if images >= step)


def candidates(device: str, input_size: int) -> tuple[int, ...]:
    """Batch sizes to try. On a CPU, whose memory is not asked about, no more pixels than as many images of 224 x 224
    have: a large image is as fast alone, and each stream has a batch of them."""
    if device != "cpu":
        return CANDIDATES[device]
    sizes = (min(size, images_at_once(size, input_size, input_size)) for size in CANDIDATES[device])
    return tuple(dict.fromkeys(sizes))


def knee(curve: Mapping[int, float], smallest: int) -> int:
    """The smallest batch size whose rate is nearly that of the best. Where not even the smallest candidate fitted, that
    one: the predictor goes on with less."""
    if not curve:
        return smallest
    best = max(curve.values())
    return min(size for size, rate in curve.items() if rate >= ENOUGH * best)


def _curve(spec: ModelSpec, info: ModelInfo, engine: str, device: str) -> Iterator[tuple[int, float]]:
    """Batch sizes and their rates in images/s, up to where the device's memory ends or a batch would take long."""
    # Compiling takes a minute for each size and moves the knee little.
    engine = "eager" if engine == "compile" else engine
    per_image = 0.0
    for size in candidates(device, spec.input_size or 224):
        if size * per_image > LONGEST:
            return
        try:
            rate, per_image = _measured(load_engine(engine, spec, info, device, size), spec, device, size)
        except OutOfMemory:
            return
        yield size, rate
        if device == "cuda" and _share_of_memory_used() > MEMORY / 2:  # the next size takes twice as much
            return


def _measured(engine: Engine, spec: ModelSpec, device: str, batch_size: int) -> tuple[float, float]:
    """Images/s, and the seconds that an image of a batch takes."""
    rate = measure_rate(engine, spec, device, batch_size)
    return rate, engine.streams / rate


def measure_rate(engine: Engine, spec: ModelSpec, device: str, batch_size: int, seconds: float = SECONDS) -> float:
    """Images/s of an engine on batches of noise, warm; on a GPU without the copies, which a run does meanwhile."""
    side = spec.input_size or 224
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    compute_one = partial(engine, pixels) if device == "cpu" else _on_device(engine, pixels)
    compute_one()
    begun = time.perf_counter()

    def compute() -> int:
        batches = 0
        while time.perf_counter() - begun < seconds:
            compute_one()
            batches += 1
        return batches

    with ThreadPoolExecutor(engine.streams) as threads:
        others = [threads.submit(compute) for _ in range(engine.streams - 1)]
        batches = compute() + sum(other.result() for other in others)  # torch computes best where it was loaded: here
    return batches * batch_size / (time.perf_counter() - begun)


def _on_device(engine: Engine, pixels: PixelBatch) -> Callable[[], object]:
    from pipeline.model.torch_engine import TorchEngine

    assert isinstance(engine, TorchEngine), "the other engines know CPUs only"
    return engine.resident(pixels)


def _share_of_memory_used() -> float:
    """Since this was asked last. What is not in use any more is let go: a network refers to itself."""
    import torch

    share: float = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return share


def _hardware(device: str) -> list[str | int]:
    if device == "cpu":
        return [*_processor(), num_cores()]
    import torch

    return [torch.cuda.get_device_name(0)]


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What tells kinds of CPUs apart: Python knows the architecture alone on Linux."""
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:  # another system
        return [platform.processor() or platform.machine()]
    found = [line for line in first.splitlines() if line.startswith(("model name", "flags", "CPU ", "Features"))]
    return found or [platform.machine()]
