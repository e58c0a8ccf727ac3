"""The flow of a run: the Ray Data graph from shards to pieces. The only module that imports ray.data.

What the driver does while the graph runs is in `driver.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.cluster import Cluster
from pipeline.deaths import Guard, Notes
from pipeline.errors import Stopped
from pipeline.inputs.stream import pixel_blocks, read_rows, rows_of, sample_blocks
from pipeline.model.predictor import ResNetPredictor
from pipeline.model.results import CALLS
from pipeline.planning import Task
from pipeline.preparation import WAITING_CPUS, Job, Reading, decode_cpus
from pipeline.rows import Row
from pipeline.storage import Store
from pipeline.verdict import are_few

READ_TASK_BYTES = 64 * 2**20
GPU_TASK_BYTES = 8 * READ_TASK_BYTES  # batches are as many times as large there, and what ends a task fills none

Chunk = list[tuple[int, Task]]  # consecutive tasks of a plan, with their places in it


def pieces(tasks: Sequence[Task], job: Job, cluster: Cluster, notes: Notes) -> Dataset:
    """Shards to pieces. With fewer shards than cores, decoding is a map of its own, so that one large tar uses all
    cores; else it happens where the shard is read and no bytes travel."""
    chunks = _chunks(tasks, cluster.num_cpus, GPU_TASK_BYTES if job.settings.device == "cuda" else READ_TASK_BYTES)
    has_few_shards = are_few(len(tasks), cluster.num_cpus)
    with DataContext.current(_context(job)):
        if has_few_shards:
            shards = _Shards(partial(_samples, reading=job.reading, notes=notes), chunks)
            samples = _read(shards, WAITING_CPUS)
            pixels = samples.map_batches(
                _decode_block,  # type: ignore[arg-type]  # it takes more besides
                fn_args=(job.reading, notes),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=decode_cpus(cluster, job.shares_cores),
            )
        else:
            shards = _Shards(partial(_pixels, reading=job.reading, notes=notes), chunks)
            pixels = _read(shards, decode_cpus(cluster, job.shares_cores))
        # Not map_batches, which insists on a batch size where there is a GPU.
        return pixels.map_batches_internal(
            ResNetPredictor,
            fn_constructor_args=(job.spec, job.info, job.settings, notes, job.decoder),
            batch_size=_rows_at_once(job, has_few_shards),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=job.num_actors, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
            ),
            num_cpus=WAITING_CPUS,
            num_gpus=job.num_gpus or None,
        )


def _rows_at_once(job: Job, has_few_shards: bool) -> int | None:
    """How many rows Ray gathers, or a few more, for a call of the predictor, which cuts them into batches; None: a
    block as it comes.

    Where blocks may hold less than a batch, the rest of it would be padding. With a shard or more for each core blocks
    are full, but at the end of a task: a CPU, whose first rows would come late, takes them as they are. Encoded images
    of some megabytes come a few in a block.
    """
    if job.spec.input_size is None:  # any of them may be large, and each fills a batch of its own
        return None
    if job.decoder is not None:
        return job.settings.batch_size
    return job.rows_per_block if has_few_shards or job.num_gpus else None


def execute(dataset: Dataset) -> tuple[Iterator[Any], Callable[[], None]]:
    """Bundles of references to finished blocks as they come, and what ends the execution before that."""
    # What `iter_internal_ref_bundles` does, which keeps the executor to itself.
    with _expecting_progress():  # which Ray Data waits for here, too, until the first block
        bundles, _, executor = dataset._execute_to_iterator()
    return _bundles(bundles), partial(executor.shutdown, force=True)


def _bundles(bundles: Iterator[Any]) -> Iterator[Any]:
    with _expecting_progress():
        yield from bundles


@contextmanager
def _expecting_progress() -> Iterator[None]:
    """Raises Stopped where Ray Data sees nothing move for as long as it waits, by itself half an hour."""
    try:
        yield
    except ExecutionTimeoutError as cause:
        minutes = DataContext.get_current().execution_no_progress_timeout_s / 60
        raise Stopped(
            f"nothing has moved for {minutes:.0f} minutes: others may hold the cluster's CPUs or GPUs, or nodes that"
            " died were not replaced. Run again when there is room"
        ) from cause


def _context(job: Job) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # else a thread per task follows its memory
    context.issue_detectors_config.detectors = []  # their advice is about knobs that users don't have here
    # A block leaves its task as soon as it is full: Ray cuts at 1.5 times this and waits below it.
    context.target_max_block_size = int(job.block_bytes * 0.9)
    return context


class _Shards(Datasource):
    """Read tasks over runs of consecutive shards; `blocks` reads one of these runs."""

    def __init__(self, blocks: Callable[[Chunk], Iterator[pa.Table]], chunks: list[Chunk]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blocks, self.chunks = blocks, chunks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self._blocks, chunk), unknown) for chunk in self.chunks]


def _read(shards: _Shards, num_cpus: float) -> Dataset:
    return read_datasource(  # type: ignore[no-any-return]
        shards, num_cpus=num_cpus, override_num_blocks=len(shards.chunks)
    )


def _samples(chunk: Chunk, reading: Reading, notes: Notes) -> Iterator[pa.Table]:
    guard = Guard(notes, f"read from {chunk[0][0]}")
    return guard.watch(sample_blocks(_rows(chunk, reading, guard), reading.rows_per_block))


def _pixels(chunk: Chunk, reading: Reading, notes: Notes) -> Iterator[pa.Table]:
    guard = Guard(notes, f"decode from {chunk[0][0]}")
    return _decoded(_rows(chunk, reading, guard), reading, guard)


def _rows(chunk: Chunk, reading: Reading, guard: Guard) -> Iterator[Row]:
    store = Store(reading.storage)
    for number, task in chunk:
        yield from read_rows(number, task.shard, reading.input, store, guard)


def _decode_block(block: pa.Table, reading: Reading, notes: Notes) -> Iterator[pa.Table]:
    first = [block[name][0].as_py() for name in ("shard", "kind", "index")] if block.num_rows else []
    guard = Guard(notes, f"decode block from {first}")
    yield from _decoded(rows_of(block), reading, guard)


def _decoded(rows: Iterator[Row], reading: Reading, guard: Guard) -> Iterator[pa.Table]:
    return guard.watch(pixel_blocks(rows, reading.transform, reading.input, reading.rows_per_block, guard))


def _chunks(tasks: Sequence[Task], cores: int, max_bytes: int) -> list[Chunk]:
    """The numbered tasks in consecutive runs: enough of them for every core, none larger than need be. The first ones
    are of one shard each, so that the first rows come soon."""
    total = sum(task.shard.size for task in tasks)
    limit = min(max_bytes, total / (4 * cores))
    chunks: list[Chunk] = []
    size = 0.0
    for number, task in enumerate(tasks):
        if number <= cores or size + task.shard.size > limit:
            chunks.append([])
            size = 0
        chunks[-1].append((number, task))
        size += task.shard.size
    return chunks
