"""Engines: what executes a network on a device. torch and OpenVINO are imported by the engines that need them."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import Precision
from pipeline.errors import ConfigError
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.zoo import share_cores

PixelBatch = npt.NDArray[np.uint8]  # (B, H, W, 3)
Outputs = npt.NDArray[np.float32]  # (B, C) logits or (B, D) embeddings


# torch's matrix products of an odd number of rows are cut unevenly among threads, and a row's last bits then depend on
# where it lies: seen with MKL for 5 to 7 and 9 to 11 rows, never for up to 4 or for a multiple of 8.
ROWS = 8

log = logging.getLogger(__name__)


class Unconvertible(ConfigError):
    """OpenVINO can't compute the network, or not as torch does."""


class OutOfMemory(Exception):
    """The device has not enough memory for a batch; smaller ones may fit."""


class Engine(Protocol):
    """uint8 pixels (B, H, W, 3) to float32 logits (B, C) and embeddings (B, D).

    Height and width are `spec.input_size`, and B is the batch size that the engine was loaded for; where that size is
    None, all three may be anything. A row's bytes depend on its pixels and on B alone, not on its place or its
    neighbours.

    Raises OutOfMemory where the device has too little. Then smaller batches are asked for.
    """

    @property
    def streams(self) -> int:
        """How many calls at once, each in a thread of its own, keep all cores or the device busy. More may come."""

    def __call__(self, pixels: PixelBatch) -> tuple[Outputs, Outputs]: ...


def choose_engine(requested: str, device: str, precision: Precision) -> str:
    """The engine that `runtime.engine` means on `device` (cpu or cuda).

    `auto` is OpenVINO on CPUs that have it, and eager elsewhere: compiling takes a GPU node most of a minute and a
    C compiler. Raises ConfigError for what can't work: int8 by anything but OpenVINO, OpenVINO on a GPU or in float16.
    """
    has_openvino = importlib.util.find_spec("openvino") is not None
    if precision == "int8" and requested != "noop":
        if requested in ("auto", "openvino") and device == "cpu" and has_openvino:
            return "openvino"
        raise ConfigError(
            f"model.precision: int8 is computed by openvino on CPUs; here runtime.engine is {requested} on {device}"
            f"{'' if has_openvino else ', and openvino is not installed'}. Use runtime.device=cpu, runtime.engine=auto"
            " and pip install openvino nncf, or another precision."
        )
    if requested == "auto":
        return "openvino" if device == "cpu" and precision != "float16" and has_openvino else "eager"
    if requested == "openvino" and device != "cpu":
        raise ConfigError("runtime.engine: openvino runs on CPUs here. Use eager or compile, or runtime.device=cpu.")
    if requested == "openvino" and precision == "float16":
        raise ConfigError(
            "model.precision: openvino computes in float32, bfloat16 or int8 on CPUs. Use one of them, or eager."
        )
    return requested


def find_engine(requested: str, device: str, spec: ModelSpec) -> str:
    """What `choose_engine` says; but where `auto` would be OpenVINO and it can't compute this network as torch does,
    eager, which is said. Converts the network to find out, unless this node has done so."""
    engine = choose_engine(requested, device, spec.precision)
    if requested == "auto" and engine == "openvino" and spec.precision != "int8":
        from pipeline.model.openvino_engine import converted

        try:
            converted(spec)
        except Unconvertible as cause:
            log.warning("runtime.engine: auto is eager here. %s", cause)
            return "eager"
    return engine


def load_engine(name: str, spec: ModelSpec, info: ModelInfo, device: str, batch_size: int) -> Engine:
    """The engine `name` (not auto) with the model on `device`, for batches of exactly `batch_size` images, or of
    any number where they come in sizes of their own.

    On a CPU it takes all cores of this node. Raises ConfigError where this node can't offer the engine or the device,
    and what `zoo.build` raises.
    """
    if name == "noop":
        return Noop(info)
    if spec.is_noop:
        raise ConfigError("this model was specified for the engine noop, which needs no weights. Make a new spec.")
    share_cores()
    if name == "openvino":
        from pipeline.model.openvino_engine import load_openvino

        return load_openvino(spec, batch_size)
    if name == "eager":
        from pipeline.model.torch_engine import load_eager

        return load_eager(spec, device)
    if name == "compile":
        from pipeline.model.torch_engine import load_compiled

        return load_compiled(spec, device, batch_size)
    raise ConfigError(f"runtime.engine: there is no engine {name!r}. Use eager, compile, openvino or noop.")


def num_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: a container may see all of a machine's and have the time of a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return min(cores, math.ceil(int(granted) / int(period)))
    except (OSError, ValueError):  # no such file where there are no control groups, and `max` where there is no quota
        return cores


class Noop:
    """Zeros of the right shape, to measure the rest of the pipeline."""

    streams = 1

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def __call__(self, pixels: PixelBatch) -> tuple[Outputs, Outputs]:
        shapes = (self.info.num_classes, self.info.embedding_dim)
        logits, embeddings = (np.zeros((len(pixels), width), np.float32) for width in shapes)
        return logits, embeddings
