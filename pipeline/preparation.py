"""What is settled before a run: device, engine, batch size, the shape of the results, and what Ray is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from pipeline.calibration import calibrate, spread
from pipeline.cluster import Cluster
from pipeline.config import Input, JobConfig, Storage, Transform
from pipeline.deaths import Notes
from pipeline.errors import ConfigError
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

# Of a logical CPU, for what waits most of the time, an actor for its device or a reader for its store: so every core is
# left for decoding. Another share than a decoder's also keeps Ray from fusing decoding into the actor.
WAITING_CPUS = 0.02
BLOCK_BYTES = 40 * 2**20
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 1024
MIN_BLOCK_BATCHES = 4  # are enough where images are so large that these rows would take gigabytes
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
    def image_bytes(self) -> int:
        """The pixels of an image; where images come in sizes of their own, those of a usual one."""
        side = self.spec.transform.crop or self.spec.transform.resize or 224
        return 3 * side * side

    @property
    def rows_per_block(self) -> int:
        """Images in a block: some 40 MB of them, and full batches where all have one size."""
        least = min(MIN_BLOCK_ROWS, MIN_BLOCK_BATCHES * self.settings.batch_size)
        rows = min(max(BLOCK_BYTES // self.image_bytes, least), MAX_BLOCK_ROWS)
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
        return self.image_bytes * self.rows_per_block


_Settled = tuple[ModelSpec, ModelInfo, PredictorSettings]


def prepare(
    config: JobConfig,
    spec: ModelSpec,
    cluster: Cluster,
    shards: Sequence[Shard],
    meanwhile: Callable[[], object] = lambda: None,
) -> Job:
    """Settle on a node of the cluster what only it knows: device, engine, batch size, and the shape of the network's
    results. `meanwhile` is called where that has to be waited for.

    An int8 network that the dataset lacks is made there, of images of these shards; then the job's spec is another.
    Raises what keeps the model from being built, before anything is read.
    """
    num_gpus = 1 if cluster.num_gpus and config.runtime.device != "cpu" else 0
    known = _remembered(spec, config) if cluster.is_here and not num_gpus else None
    spec, info, settings = known or _settled_on_a_node(spec, config, num_gpus, shards, meanwhile)
    if num_gpus and settings.device == "cpu" and not spec.is_noop:
        log.warning(
            "Ray offers GPUs, but torch finds no CUDA there, perhaps for an old driver: predicting on CPUs, while every"
            " actor holds a GPU. Update the driver, or set runtime.device=cpu"
        )
    actors = config.runtime.actors
    if actors == "auto":
        actors = cluster.num_gpus if num_gpus else cluster.num_nodes
    elif num_gpus and actors > cluster.num_gpus:
        log.warning("runtime.actors: of %d actors only %d have a GPU now; the others wait", actors, cluster.num_gpus)
    return Job(config, spec, info, settings, actors, num_gpus)


def _settled_on_a_node(
    spec: ModelSpec, config: JobConfig, num_gpus: int, shards: Sequence[Shard], meanwhile: Callable[[], object]
) -> _Settled:
    settle, notes = ray.remote(num_cpus=WAITING_CPUS, num_gpus=num_gpus)(_settle), None
    if spec.needs_calibration:  # on images, of which any may kill whoever decodes it
        settle = settle.options(max_retries=CALIBRATION_RETRIES)
        notes = RayNotes(ray.remote(num_cpus=0)(Witness).remote())
    sample = spread(shards) if spec.needs_calibration else []
    settling = settle.remote(spec, config, num_gpus > 0, sample, notes)
    meanwhile()
    settled: _Settled = wait_for(settling)
    return settled


def _settle(spec: ModelSpec, config: JobConfig, on_gpu: bool, shards: Sequence[Shard], notes: Notes | None) -> _Settled:
    device, output, wanted = _device(spec, config, on_gpu), config.output, config.runtime.batch_size
    info, engine = resolve(spec), find_engine(config.runtime.engine, device, spec)
    columns = result_columns(output, info)  # what it refuses is not calibrated first
    if spec.needs_calibration:
        spec = calibrate(spec, config, shards, notes, info.has_head)
    batch_size = wanted if wanted != "auto" else choose_batch_size(spec, info, engine, device)
    return spec, info, PredictorSettings(engine, device, batch_size, columns)


def _remembered(spec: ModelSpec, config: JobConfig) -> _Settled | None:
    """What `_settle` finds without a GPU, where this node's cache holds all of it. So it needs no torch, and no worker,
    which takes a second or two to come up."""
    device, output, wanted = _device(spec, config, on_gpu=False), config.output, config.runtime.batch_size
    engine, info = choose_engine(config.runtime.engine, device, spec.precision), remembered(spec)
    if info is None or spec.needs_calibration:
        return None
    if engine == "openvino" and spec.quantised is None and not is_converted(spec):
        return None  # perhaps it cannot be
    batch_size = wanted if wanted != "auto" else remembered_batch_size(spec, engine, device)
    if batch_size is None:
        return None
    return spec, info, PredictorSettings(engine, device, batch_size, result_columns(output, info))


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
    return "cpu"
