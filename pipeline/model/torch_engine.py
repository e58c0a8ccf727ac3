"""Engines that torch executes: eager, and compiled by inductor. Imports torch; workers only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError, clean
from pipeline.model.engines import OutOfMemory, Pixels, Rows, num_cores
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.zoo import build

# Matrix products of an odd number of rows are cut unevenly among threads, and a row's last bits then depend on
# where it lies: seen with MKL for 5 to 7 and 9 to 11 rows, never for up to 4 or for a multiple of 8.
ROWS = 8

WARM_UP_SIZE = 64  # pixels, where images come in sizes of their own

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """See `Engine`. `forward` takes a uint8 tensor (N, H, W, 3) on `device`; `dtype` is autocast's, None for fp32."""

    def __init__(
        self, forward: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.forward, self.device, self.dtype = forward, device, dtype
        self._staged = torch.empty(0)

    def __call__(self, pixels: Pixels) -> tuple[Rows, Rows]:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
        try:
            with torch.inference_mode(), autocast:
                logits, embeddings = self.forward(self._stage(pixels).to(self.device, non_blocking=True))
        except torch.OutOfMemoryError as cause:
            torch.cuda.empty_cache()
            raise OutOfMemory(clean(cause)) from cause
        return logits[: len(pixels)].cpu().numpy(), embeddings[: len(pixels)].cpu().numpy()

    def _stage(self, pixels: Pixels) -> Tensor:
        """The pixels in memory of our own, filled up with black images: pinned for a GPU, writable for torch."""
        rows = len(pixels) if len(pixels) <= ROWS // 2 else -(-len(pixels) // ROWS) * ROWS
        shape = (rows, *pixels.shape[1:])
        if self._staged.shape != shape:
            self._staged = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        staged = self._staged.numpy()
        staged[: len(pixels)] = pixels
        staged[len(pixels) :] = 0
        return self._staged


def load_eager(spec: ModelSpec, device: str, threads: int | None) -> TorchEngine:
    """The network as it is, in channels_last. Sets threads and arithmetic, which torch keeps per process."""
    _prepare(device, threads)
    network = build(spec).to(torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TorchEngine(network, torch.device(device), DTYPES.get(spec.precision))


def load_compiled(spec: ModelSpec, info: ModelInfo, device: str, batch_size: int, threads: int | None) -> TorchEngine:
    """The network compiled for one batch size, and for one image size where the transform sets it.

    Compiles before it returns. Raises ConfigError if that fails, for want of a C++ compiler or Triton for example.
    """
    eager = load_eager(spec, device, threads)
    size = info.input_size
    # On a CPU weights become constants, which are packed once.
    compiled = torch.compile(eager.forward, dynamic=size is None, options={"freezing": device == "cpu"})
    engine = TorchEngine(compiled, eager.device, eager.dtype)
    side = size or WARM_UP_SIZE
    try:
        engine(np.zeros((batch_size, side, side, 3), np.uint8))
    except Exception as error:
        raise ConfigError(
            f"runtime.engine: compile does not work here with {spec.name}: {clean(error)}. It needs a C++ compiler, on"
            " a GPU also Triton. Use runtime.engine=eager."
        ) from error
    return engine


def _prepare(device: str, threads: int | None) -> None:
    """Threads, and arithmetic that is fp32 where it says so (no TF32) and the same on every run."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "runtime.device: there is no CUDA device here that torch can use. Use runtime.device=cpu."
            )
    else:
        torch.set_num_threads(threads or num_cores())
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
