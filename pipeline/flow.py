"""The flow of a run: the Ray Data graph from shards to pieces. The only module that imports ray.data.

What the driver does while the graph runs is in `driver.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.calibration import calibrate, spread
from pipeline.cluster import Cluster
from pipeline.config import JobConfig
from pipeline.deaths import Guard, Notes
from pipeline.driver import readable
from pipeline.errors import ConfigError
from pipeline.inputs.shards import Shard
from pipeline.inputs.stream import pixel_blocks, read_rows, rows_of, sample_blocks
from pipeline.model.engines import choose_engine
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.results import CALLS
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.tuning import choose_batch_size, remembered_batch_size
from pipeline.model.zoo import remembered, resolve
from pipeline.nvjpeg import DeviceDecoder, device_decoder
from pipeline.planning import Task
from pipeline.rows import Columns, Row
from pipeline.storage import Store
from pipeline.witness import RayNotes, Witness, wait_for

log = logging.getLogger(__name__)

# Shares of a logical CPU. An actor waits for its device most of the time, so that every core is left for decoding.
# Other shares than those of decoders also keep Ray from fusing decoding into the actor.
PREDICT_CPUS = 0.02
READ_CPUS = 0.02
BLOCK_BYTES = 40 * 2**20
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 1024
READ_TASK_BYTES = 64 * 2**20
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
        side = self.info.transform.crop or self.info.transform.resize or 224
        rows = min(max(BLOCK_BYTES // (3 * side * side), MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
        return max(rows // self.settings.batch_size, 1) * self.settings.batch_size

    @property
    def shares_cores(self) -> bool:
        """Whether the network is computed on the cores that decode."""
        return self.settings.device == "cpu" and not self.spec.is_noop

    @property
    def decoder(self) -> DeviceDecoder | None:
        """What decodes on the device; None where cores do."""
        return device_decoder(self.info.transform, self.config.input.max_pixels, self.settings.device)

    @property
    def block_bytes(self) -> int:
        side = self.info.transform.crop or self.info.transform.resize or 224
        return 3 * side * side * self.rows_per_block


def prepare(config: JobConfig, spec: ModelSpec, cluster: Cluster, shards: Sequence[Shard]) -> Job:
    """Settle on a node of the cluster what only it knows: device, engine, batch size, and the shape of the network's
    results.

    An int8 network that the dataset lacks is made there, of images of these shards; then the job's spec is another.
    Raises what keeps the model from being built, before anything is read.
    """
    num_gpus = 1 if cluster.num_gpus and config.runtime.device != "cpu" else 0
    settled = _remembered(spec, config) if cluster.is_here and not num_gpus else None
    if settled is None:
        settle, notes = ray.remote(num_cpus=PREDICT_CPUS, num_gpus=num_gpus)(_settle), None
        if spec.needs_calibration:  # on images, of which any may kill whoever decodes it
            settle = settle.options(max_retries=CALIBRATION_RETRIES)
            notes = RayNotes(ray.remote(num_cpus=0)(Witness).remote())
        try:
            sample = spread(shards) if spec.needs_calibration else []
            settled = wait_for(settle.remote(spec, config, num_gpus > 0, sample, notes))
        except ray.exceptions.RayError as cause:
            raise readable(cause) from cause
    output, runtime = config.output, config.runtime
    actors = runtime.actors if runtime.actors != "auto" else (cluster.num_gpus if num_gpus else cluster.num_nodes)
    columns = Columns(output.predictions, output.embeddings, output.embedding_dtype, settled.info.embedding_dim)
    settings = PredictorSettings(settled.engine, settled.device, settled.batch_size, output.top_k, columns)
    return Job(config, settled.spec, settled.info, settings, actors, num_gpus)


class _Settled(NamedTuple):
    spec: ModelSpec
    info: ModelInfo
    device: str
    engine: str
    batch_size: int


def _settle(spec: ModelSpec, config: JobConfig, on_gpu: bool, shards: Sequence[Shard], notes: Notes | None) -> _Settled:
    device = _device(spec, config, on_gpu)
    engine, info = choose_engine(config.runtime.engine, device, spec.precision), resolve(spec)
    if spec.needs_calibration:
        spec = calibrate(spec, config, shards, notes)
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
    wanted = config.runtime.batch_size
    batch_size = wanted if wanted != "auto" else remembered_batch_size(spec, info, engine, device)
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


# --- The graph -----------------------------------------------------------------------------------------------------


def pieces(tasks: Sequence[Task], job: Job, cluster: Cluster, notes: Notes) -> Dataset:
    """Shards to pieces. With fewer shards than cores, decoding is a map of its own, so that one large tar uses all
    cores; else it happens where the shard is read and no bytes travel."""
    with DataContext.current(_context(job)):
        if len(tasks) < cluster.num_cpus:
            samples = _read(_SampleSource(tasks, job, cluster, notes), READ_CPUS)
            pixels = samples.map_batches(
                _decode_block,  # type: ignore[arg-type]  # it takes more besides
                fn_args=(job, notes),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=decode_cpus(cluster, job.shares_cores),
            )
        else:
            pixels = _read(_PixelSource(tasks, job, cluster, notes), decode_cpus(cluster, job.shares_cores))
        # Not map_batches: with a GPU that insists on a batch size, and would hold blocks back until it is reached.
        return pixels.map_batches_internal(
            ResNetPredictor,
            fn_constructor_args=(job.spec, job.info, job.settings, notes, job.decoder),
            batch_size=None,  # a block as it is: the predictor cuts it into batches of its own
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=job.num_actors, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
            ),
            num_cpus=PREDICT_CPUS,
            num_gpus=job.num_gpus or None,
        )


def execute(dataset: Dataset) -> tuple[Iterator[Any], Callable[[], None]]:
    """Bundles of references to finished blocks as they come, and what ends the execution before that."""
    # What `iter_internal_ref_bundles` does, which keeps the executor to itself.
    bundles, _, executor = dataset._execute_to_iterator()
    return bundles, partial(executor.shutdown, force=True)


def _context(job: Job) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # else a thread per task follows its memory
    context.issue_detectors_config.detectors = []  # their advice is about knobs that users don't have here
    # A block leaves its task as soon as it is full: Ray cuts at 1.5 times this and waits below it.
    context.target_max_block_size = int(job.block_bytes * 0.9)
    return context


class _Source(Datasource):
    """Read tasks over runs of consecutive shards."""

    def __init__(self, tasks: Sequence[Task], job: Job, cluster: Cluster, notes: Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._job, self._notes = job, notes
        self.chunks = _chunks(tasks, cluster.num_cpus)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._reader(chunk), unknown) for chunk in self.chunks]

    def _reader(self, chunk: list[tuple[int, Task]]) -> Callable[[], Iterator[pa.Table]]:
        raise NotImplementedError


class _SampleSource(_Source):
    def _reader(self, chunk: list[tuple[int, Task]]) -> Callable[[], Iterator[pa.Table]]:
        job, notes = self._job, self._notes

        def blocks() -> Iterator[pa.Table]:
            guard = Guard(notes, f"read from {chunk[0][0]}")
            return guard.watch(sample_blocks(_rows(chunk, job.config, guard), job.rows_per_block))

        return blocks


class _PixelSource(_Source):
    def _reader(self, chunk: list[tuple[int, Task]]) -> Callable[[], Iterator[pa.Table]]:
        job, notes = self._job, self._notes

        def blocks() -> Iterator[pa.Table]:
            guard = Guard(notes, f"decode from {chunk[0][0]}")
            return _decoded(_rows(chunk, job.config, guard), job, guard)

        return blocks


def _read(source: _Source, num_cpus: float) -> Dataset:
    return read_datasource(  # type: ignore[no-any-return]
        source, num_cpus=num_cpus, override_num_blocks=len(source.chunks)
    )


def _rows(chunk: list[tuple[int, Task]], config: JobConfig, guard: Guard) -> Iterator[Row]:
    store = Store(config.input_storage)
    for number, task in chunk:
        yield from read_rows(number, task.shard, config.input, store, guard)


def _decode_block(block: pa.Table, job: Job, notes: Notes) -> Iterator[pa.Table]:
    first = [block[name][0].as_py() for name in ("shard", "kind", "index")] if block.num_rows else []
    guard = Guard(notes, f"decode block from {first}")
    yield from _decoded(rows_of(block), job, guard)


def _decoded(rows: Iterator[Row], job: Job, guard: Guard) -> Iterator[pa.Table]:
    return guard.watch(pixel_blocks(rows, job.info.transform, job.config.input, job.rows_per_block, guard))


def _chunks(tasks: Sequence[Task], cores: int) -> list[list[tuple[int, Task]]]:
    """The numbered tasks in consecutive runs: enough of them for every core, none larger than need be. The first ones
    are of one shard each, so that the first rows come soon."""
    total = sum(task.shard.size for task in tasks)
    limit = min(READ_TASK_BYTES, total / (4 * cores))
    chunks: list[list[tuple[int, Task]]] = []
    size = 0.0
    for number, task in enumerate(tasks):
        if number <= cores or size + task.shard.size > limit:
            chunks.append([])
            size = 0
        chunks[-1].append((number, task))
        size += task.shard.size
    return chunks
