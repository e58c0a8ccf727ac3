"""What is settled before a run: device, engine, batch size, the shape of the results, and what Ray is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ray

from pipeline.calibration import calibrate, spread
from pipeline.cluster import Cluster
from pipeline.config import Input, JobConfig, Storage, Transform
from pipeline.deaths import Notes
from pipeline.errors import ConfigError
from pipeline.failures import readable
from pipeline.inputs.shards import Shard
from pipeline.model.engines import choose_engine, find_engine
from pipeline.model.openvino_engine import is_converted
from pipeline.model.predictor import PredictorSettings
from pipeline.model.spec import ModelInfo, ModelSpec, result_columns
from pipeline.model.tuning import choose_batch_size, remembered_batch_size
from pipeline.model.zoo import remembered, resolve
from pipeline.nvjpeg import DeviceDecoder, device_decoder
from pipeline.witness import RayNotes, Witness, wait_for

log = logging.getLogger(__name__)

# Of a logical CPU. An actor waits for its device most of the time, so that every core is left for decoding.
# Another share than a decoder's also keeps Ray from fusing decoding into the actor.
PREDICT_CPUS = 0.02
BLOCK_BYTES = 40 * 2**20
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 1024
CALIBRATION_RETRIES = 20  # five find one image that kills


def decode_cpus(cluster: Cluster, shares_cores: bool) -> float:
    """The share of a logical CPU that a decoder asks for: n + 1 of them and an actor fit on a node of n cores, or n
    where the network is computed on the same cores.

    Ray takes a tenth of a second to start the next task where one has ended. The one more works meanwhile, if the
    network does not.
    """
    cores = cluster.num_cpus / cluster.num_nodes
    return round((cores + 0.5 if shares_cores else 0.97 * cores) / (cores + 1), 3)


@dataclass(frozen=True)
class Reading:
    """What reading and decoding is told. A copy travels with each of its tasks, of which there may be many."""

    input: Input
    storage: Storage
    transform: Transform
    rows_per_block: int


@dataclass(frozen=True)
class Job:
    """All that the workers of a run share."""

    config: JobConfig
    spec: ModelSpec
    info: ModelInfo
    settings: PredictorSettings
    num_actors: int
    num_gpus: float  # of each actor

    @property
    def rows_per_block(self) -> int:
        """Images in a block: full batches of some 40 MB in all."""
        side = self.spec.transform.crop or self.spec.transform.resize or 224
        rows = min(max(BLOCK_BYTES // (3 * side * side), MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
        return max(rows // self.settings.batch_size, 1) * self.settings.batch_size

    @property
    def shares_cores(self) -> bool:
        """Whether the network is computed on the cores that decode."""
        return self.settings.device == "cpu" and not self.spec.is_noop

    @property
    def reading(self) -> Reading:
        return Reading(self.config.input, self.config.input_storage, self.spec.transform, self.rows_per_block)

    @property
    def decoder(self) -> DeviceDecoder | None:
        """What decodes on the device; None where cores do."""
        return device_decoder(self.spec.transform, self.config.input.max_pixels, self.settings.device)

    @property
    def block_bytes(self) -> int:
        side = self.spec.transform.crop or self.spec.transform.resize or 224
        return 3 * side * side * self.rows_per_block


def prepare(config: JobConfig, spec: ModelSpec, cluster: Cluster, shards: Sequence[Shard]) -> Job:
    """Settle on a node of the cluster what only it knows: device, engine, batch size, and the shape of the network's
    results.

    An int8 network that the dataset lacks is made there, of images of these shards; then the job's spec is another.
    Raises what keeps the model from being built, before anything is read.
    """
    return begin_preparing(config, spec, cluster, shards)()


def begin_preparing(config: JobConfig, spec: ModelSpec, cluster: Cluster, shards: Sequence[Shard]) -> Callable[[], Job]:
    """`prepare` for who has something else to do meanwhile: the job is returned by what this returns."""
    num_gpus = 1 if cluster.num_gpus and config.runtime.device != "cpu" else 0
    wait = _begin_settling(spec, config, cluster, num_gpus, shards)

    def job() -> Job:
        settled, runtime = wait(), config.runtime
        actors = runtime.actors if runtime.actors != "auto" else (cluster.num_gpus if num_gpus else cluster.num_nodes)
        columns = result_columns(config.output, settled.info)
        settings = PredictorSettings(settled.engine, settled.device, settled.batch_size, columns)
        return Job(config, settled.spec, settled.info, settings, actors, num_gpus)

    return job


class _Settled(NamedTuple):
    spec: ModelSpec
    info: ModelInfo
    device: str
    engine: str
    batch_size: int


def _begin_settling(
    spec: ModelSpec, config: JobConfig, cluster: Cluster, num_gpus: int, shards: Sequence[Shard]
) -> Callable[[], _Settled]:
    known = _remembered(spec, config) if cluster.is_here and not num_gpus else None
    if known is not None:
        return lambda: known
    settle, notes = ray.remote(num_cpus=PREDICT_CPUS, num_gpus=num_gpus)(_settle), None
    if spec.needs_calibration:  # on images, of which any may kill whoever decodes it
        settle = settle.options(max_retries=CALIBRATION_RETRIES)
        notes = RayNotes(ray.remote(num_cpus=0)(Witness).remote())
    sample = spread(shards) if spec.needs_calibration else []
    settling = settle.remote(spec, config, num_gpus > 0, sample, notes)

    def wait() -> _Settled:
        try:
            settled: _Settled = wait_for(settling)
        except ray.exceptions.RayError as cause:
            raise readable(cause) from cause
        return settled

    return wait


def _settle(spec: ModelSpec, config: JobConfig, on_gpu: bool, shards: Sequence[Shard], notes: Notes | None) -> _Settled:
    device = _device(spec, config, on_gpu)
    info, engine = resolve(spec), find_engine(config.runtime.engine, device, spec)
    result_columns(config.output, info)  # what it refuses is not calibrated first
    if spec.needs_calibration:
        spec = calibrate(spec, config, shards, notes, info.has_head)
    wanted = config.runtime.batch_size
    batch_size = wanted if wanted != "auto" else choose_batch_size(spec, info, engine, device)
    return _Settled(spec, info, device, engine, batch_size)


def _remembered(spec: ModelSpec, config: JobConfig) -> _Settled | None:
    """What `_settle` finds without a GPU, where this node's cache holds all of it. So it needs no torch, and no worker,
    which takes a second or two to come up."""
    device = _device(spec, config, on_gpu=False)
    engine, info = choose_engine(config.runtime.engine, device, spec.precision), remembered(spec)
    if info is None or spec.needs_calibration:
        return None
    if engine == "openvino" and spec.quantised is None and not is_converted(spec):
        return None  # perhaps it cannot be
    wanted = config.runtime.batch_size
    batch_size = wanted if wanted != "auto" else remembered_batch_size(spec, engine, device)
    return None if batch_size is None else _Settled(spec, info, device, engine, batch_size)


def _device(spec: ModelSpec, config: JobConfig, on_gpu: bool) -> str:
    """`cpu` or `cuda`. Raises ConfigError where the config asks for what that can't do."""
    device = "cpu" if spec.is_noop else _granted(config.runtime.device, on_gpu)
    device_decoder(spec.transform, config.input.max_pixels, device)
    return device


def _granted(requested: str, on_gpu: bool) -> str:
    """`cuda` where a GPU was granted and torch can use it."""
    if on_gpu:
        import torch

        if torch.cuda.is_available():
            return "cuda"
    if requested == "cuda":
        raise ConfigError("runtime.device: cuda was asked for, but no node of this cluster offers a GPU to torch.")
    if on_gpu:
        log.warning("Ray granted a GPU, but torch finds no CUDA there: predicting on the CPU")
    return "cpu"
