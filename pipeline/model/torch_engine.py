"""Engines that torch executes: eager, and compiled by inductor. Imports torch; workers only."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from pipeline.config import digest
from pipeline.errors import ConfigError, FatalError, PipelineError, clean
from pipeline.model.cache import cache_directory, lock
from pipeline.model.engines import ROWS, OutOfMemory, Outputs, PixelBatch, num_cores
from pipeline.model.network import Network
from pipeline.model.spec import ModelSpec
from pipeline.model.tuning import images_at_once
from pipeline.model.zoo import build, cache_key
from pipeline.rows import Columns

PHOTOGRAPH = (384, 512)  # height and width, where images come in sizes of their own; not square: that would be a rule

log = logging.getLogger(__name__)

# What CUDA's libraries say where there is no memory for their own use.
NO_MEMORY = re.compile(
    "unable to find an engine to execute|STATUS_ALLOC_FAILED|ALLOCATOR_FAIL|CUBLAS_STATUS_NOT_INITIALIZED"
    "|CUDNN_STATUS_NOT_INITIALIZED|CUDA error: out of memory|CUDA out of memory"  # the last within a compiler's error
    "|DefaultCPUAllocator: can't allocate memory"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """See `Engine`. `forward` takes a uint8 tensor (N, H, W, 3) on `device`; `dtype` is autocast's, None for fp32."""

    streams = 1

    def __init__(
        self, forward: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.forward, self.device, self.dtype = forward, device, dtype
        self._staged = torch.empty(0)

    def __call__(self, pixels: PixelBatch) -> tuple[Outputs, Outputs]:
        with memory_errors():
            logits, embeddings = self._compute(self._stage(pixels).to(self.device))
            return logits[: len(pixels)].cpu().numpy(), embeddings[: len(pixels)].cpu().numpy()

    def results(self, pixels: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of `Results`, computed where the pixels are."""
        with torch.inference_mode():
            return results_of(*self._compute(pixels), columns)

    def resident(self, pixels: PixelBatch) -> Callable[[], object]:
        """What computes this batch again and again where it lies then, and waits for the results."""
        with memory_errors():
            there = torch.from_numpy(pixels).to(self.device)

        def compute() -> object:
            with memory_errors():
                *_, is_finite = self.results(there, Columns(0, None, 0))
                return is_finite.cpu()

        return compute

    def _compute(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
        with torch.inference_mode(), autocast:
            return self.forward(pixels)

    def _stage(self, pixels: PixelBatch) -> Tensor:
        """The pixels in memory of our own, which torch may write to, filled up with black images."""
        rows = len(pixels) if len(pixels) <= ROWS // 2 else -(-len(pixels) // ROWS) * ROWS
        shape = (rows, *pixels.shape[1:])
        if self._staged.shape != shape:
            self._staged = torch.zeros(shape, dtype=torch.uint8)
        staged = self._staged.numpy()
        staged[: len(pixels)] = pixels
        staged[len(pixels) :] = 0
        return self._staged


@contextmanager
def memory_errors() -> Iterator[None]:
    """torch's error, as `Engine` raises it."""
    try:
        yield
    except RuntimeError as cause:
        if not isinstance(cause, torch.OutOfMemoryError) and not NO_MEMORY.search(str(cause)):
            raise
        traceback.clear_frames(cause.__traceback__)  # which hold what the device had computed so far
        torch.cuda.empty_cache()
        raise OutOfMemory(clean(cause)) from cause


def results_of(logits: Tensor, embeddings: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `results.results_of` does, where the tensors are: scores, ids, embeddings as stored, and what is finite."""
    is_finite = logits.isfinite().all(dim=1)
    scores, ids = logits[:, :0], torch.empty((len(logits), 0), dtype=torch.int32, device=logits.device)
    if columns.top_k:
        # Not topk, which breaks ties as it likes.
        scores, ids = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        scores, ids = scores[:, : columns.top_k], ids[:, : columns.top_k].to(torch.int32)
    stored = embeddings[:, :0]
    if columns.embedding_dtype:
        stored = embeddings.to(DTYPES.get(columns.embedding_dtype, torch.float32))
        is_finite &= stored.isfinite().all(dim=1)
    return scores, ids, stored, is_finite


def load_eager(spec: ModelSpec, device: str) -> TorchEngine:
    """The network in channels_last, or as it is where it does not run so, which is said.

    Sets threads, and through `build` arithmetic, which torch keeps per process.
    """
    _prepare(device)
    dtype = DTYPES.get(spec.precision)
    if device == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"model.precision: {torch.cuda.get_device_name()} has no bfloat16, and would be slow at it. Use float16."
        )
    network = _built(spec, device)
    side = network.head.input_size
    try:
        with memory_errors():
            if not network.head.is_contiguous:
                network = network.to(memory_format=torch.channels_last)
            if dtype is not None:
                _convert_weights(network, dtype)
            engine = TorchEngine(network.to(device), torch.device(device), dtype)
        engine(np.zeros((2, side, side, 3), np.uint8))
    except OutOfMemory:
        raise
    except Exception as cause:  # some look at how their weights lie in memory, or at their type
        if _is_of_device(cause):
            raise
        log.warning("%s is computed as it is, which may be slower than in channels_last: %s", spec.name, clean(cause))
        engine = _as_it_is(spec, device, dtype, side)
    return engine


def _is_of_device(cause: Exception) -> bool:
    """Whether the device is in trouble, and not the network: then another process, or another day, may do better."""
    return isinstance(cause, torch.AcceleratorError) and "no kernel image" not in str(cause)


def _as_it_is(spec: ModelSpec, device: str, dtype: torch.dtype | None, side: int) -> TorchEngine:
    try:
        with memory_errors():
            engine = TorchEngine(_built(spec, device).to(device), torch.device(device), dtype)
        engine(np.zeros((2, side, side, 3), np.uint8))
    except (OutOfMemory, PipelineError):
        raise
    except Exception as cause:
        if _is_of_device(cause):
            raise
        raise FatalError(
            f"the network {spec.name} does not run on {device} in {spec.precision}: {clean(cause)}. Let it make its"
            " tensors where its input is, or set runtime.device=cpu and model.precision=float32."
        ) from cause
    return engine


def load_compiled(spec: ModelSpec, device: str, batch_size: int) -> TorchEngine:
    """The network compiled for one batch size and one image size; where the transform sets none, for photographs.

    Compiles before it returns, or loads what this node has compiled before; images of their own sizes that are much
    smaller, or as many more at once, are compiled for as they come, some times in all.

    Raises ConfigError if that fails, for want of a C++ compiler or Triton for example.
    """
    eager = load_eager(spec, device)
    size = spec.input_size
    compiled = torch.compile(eager.forward, dynamic=size is None, options=compile_options(device, size))
    engine = TorchEngine(_frozen(compiled), eager.device, eager.dtype)
    shape = (batch_size, size, size) if size else (images_at_once(batch_size, *PHOTOGRAPH), *PHOTOGRAPH)
    key = cache_key(spec, "torch", "torchvision") if size is not None else None
    try:
        with memory_errors(), _compiler_cache(None if key is None else digest([key, device, batch_size], 32)):
            pixels = np.zeros((*shape, 3), np.uint8)
            if eager.device.type == "cpu":
                engine(pixels)
            else:  # as `transfer.py` calls it, with exactly that shape; and once more, so that a graph is recorded
                for _ in range(2):
                    engine.results(torch.from_numpy(pixels).to(device), Columns(0, None, 0))
    except OutOfMemory:
        raise
    except Exception as error:
        if _is_of_device(error):
            raise
        raise ConfigError(
            f"runtime.engine: compile does not work here with {spec.name}: {clean(error)}. It needs a C++ compiler, on"
            " a GPU also Triton. Use runtime.engine=eager."
        ) from error
    return engine


@contextmanager
def _compiler_cache(key: str | None) -> Iterator[None]:
    """Have the compiler keep its files in this node's cache, written by one process and read by all; None: until this
    one ends.

    It doesn't write them at once: where it was killed, half a library stays, which fails every process after it. So
    what was not finished is thrown away.
    """
    if key is None:
        folder = Path(tempfile.mkdtemp(prefix="inductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _keep_compiled_in(folder)
        yield
        return
    folder = cache_directory("inductor") / key
    is_whole = folder / "whole"
    _keep_compiled_in(folder)
    if not is_whole.exists():
        with lock(str(folder)):
            if not is_whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                yield
                is_whole.touch()
                return
    yield


def _keep_compiled_in(folder: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")  # torch sets it once, and it would stay in another folder


def compile_options(device: str, size: int | None) -> dict[str, Any]:
    """On a GPU, a graph of all kernels, launched at once; not where images have sizes of their own, since every size
    would keep a graph and its memory."""
    return {"triton.cudagraphs": device == "cuda" and size is not None}


def _frozen(compiled: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """With frozen weights: constants, which are folded into each other and laid out once. Not one of the `options`:
    torch decides, before it comes to them, what is a constant."""

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with inductor_config.patch(freezing=True):
            return compiled(pixels)

    return forward


def _built(spec: ModelSpec, device: str) -> Network:
    network = build(spec)
    _prepare(device)  # again: its own code may set a number of threads
    return network


def _convert_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that autocast would convert for every batch. The numbers are the same.

    Not those of layers derived from these, or with hooks that make their weights (weight_norm), which may do more with
    them than autocast knows of; nor those of linear layers, around which heads like to switch autocast off.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and not module._forward_pre_hooks:
            module.to(dtype)


def _prepare(device: str) -> None:
    """Threads; ConfigError where there is no such device."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "runtime.device: there is no CUDA device here that torch can use. Use runtime.device=cpu."
            )
    else:
        torch.set_num_threads(num_cores())
