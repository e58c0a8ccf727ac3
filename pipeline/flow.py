"""The flow of a run: the Ray Data graph from shards to pieces, and the loop that turns receipts into commits.

The only module that imports ray.data. `pieces` is the graph; `Run.loop` is what the driver does meanwhile. The
driver handles receipts and references only, never pixels or vectors.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.cluster import Cluster
from pipeline.config import JobConfig, Runtime
from pipeline.errors import ConfigError, ModelMismatch, PipelineError
from pipeline.inputs.shards import current_fingerprint
from pipeline.inputs.stream import pixel_blocks, read_rows, rows_of, sample_blocks
from pipeline.model.engines import choose_engine
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.spec import ModelInfo, ModelSpec
from pipeline.model.zoo import resolve
from pipeline.outputs.commit import CommitContext, CommitTask, Committed, commit_shard, describe
from pipeline.outputs.ledger import Abandon, Commit, Decision, Progress, Receipt
from pipeline.planning import Task
from pipeline.rows import Columns
from pipeline.storage import Store

log = logging.getLogger(__name__)

# Shares of a logical CPU. An actor waits for its device most of the time, so that every core is left for decoding:
# n decoders and an actor fit on n cores. Different shares also keep Ray from fusing decoding into the actor.
PREDICT_CPUS = 0.1
READ_CPUS = 0.1
DECODE_CPUS = 0.9
BLOCK_BYTES = 16 * 2**20
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 128, 1024
READ_TASK_BYTES = 64 * 2**20
MAX_COMMITS = 16  # under way at once; more pieces than that wait in the object store
STOP_GRACE_S = 20.0
PUMP_GRACE_S = 5.0
BATCH_SIZE = {"cpu": 32, "cuda": 256}


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
        """Images in a block: full batches of some 16 MB in all."""
        side = self.info.transform.crop or self.info.transform.resize or 224
        rows = min(max(BLOCK_BYTES // (3 * side * side), MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
        return max(rows // self.settings.batch_size, 1) * self.settings.batch_size

    @property
    def block_bytes(self) -> int:
        side = self.info.transform.crop or self.info.transform.resize or 224
        return 3 * side * side * self.rows_per_block


class Watcher(Protocol):
    """Who is told what happens, such as a progress bar."""

    def on_rows(self, rows: int, errors: int) -> None: ...
    def on_committed(self, task: Task, committed: Committed) -> None: ...
    def on_open(self, task: Task, reason: str) -> None: ...
    def on_tick(self) -> None: ...


def prepare(config: JobConfig, spec: ModelSpec, cluster: Cluster) -> Job:
    """Settle on a node of the cluster what only it knows: device, engine, and the shape of the network's results.

    Raises what keeps the model from being built, before anything is read.
    """
    num_gpus = 1 if cluster.num_gpus and config.runtime.device != "cpu" else 0
    settle = ray.remote(num_cpus=PREDICT_CPUS, num_gpus=num_gpus)(_settle)
    try:
        info, device, engine = ray.get(settle.remote(spec, config.runtime, num_gpus > 0))
    except ray.exceptions.RayError as cause:
        raise readable(cause) from cause
    output, runtime = config.output, config.runtime
    batch_size = runtime.batch_size if runtime.batch_size != "auto" else BATCH_SIZE[device]
    actors = runtime.actors if runtime.actors != "auto" else (cluster.num_gpus if num_gpus else cluster.num_nodes)
    columns = Columns(output.predictions, output.embeddings, output.embedding_dtype, info.embedding_dim)
    return Job(
        config, spec, info, PredictorSettings(engine, device, batch_size, output.top_k, columns), actors, num_gpus
    )


def _settle(spec: ModelSpec, runtime: Runtime, on_gpu: bool) -> tuple[ModelInfo, str, str]:
    device = "cpu" if spec.is_noop else _device(runtime.device, on_gpu)
    return resolve(spec), device, choose_engine(runtime.engine, device, spec.precision)


def _device(requested: str, on_gpu: bool) -> str:
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


def pieces(tasks: Sequence[Task], job: Job, cluster: Cluster) -> Dataset:
    """Shards to pieces. With fewer shards than cores, decoding is a map of its own, so that one large tar uses all
    cores; else it happens where the shard is read and no bytes travel."""
    with DataContext.current(_context(job)):
        if len(tasks) < cluster.num_cpus:
            samples = _read(_SampleSource(tasks, job, cluster), READ_CPUS)
            pixels = samples.map_batches(
                _decode_block,  # type: ignore[arg-type]  # it takes the job besides
                fn_args=(job,),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
            )
        else:
            pixels = _read(_PixelSource(tasks, job, cluster), DECODE_CPUS)
        # Not map_batches: with a GPU that insists on a batch size, and would hold blocks back until it is reached.
        return pixels.map_batches_internal(
            ResNetPredictor,
            fn_constructor_args=(job.spec, job.info, job.settings),
            batch_size=None,  # a block as it is: the predictor cuts it into batches of its own
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=job.num_actors),
            num_cpus=PREDICT_CPUS,
            num_gpus=job.num_gpus or None,
        )


def _context(job: Job) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A block leaves its task as soon as it is full: Ray cuts at 1.5 times this and waits below it.
    context.target_max_block_size = int(job.block_bytes * 0.9)
    return context


class _Source(Datasource):
    """Read tasks over runs of consecutive shards."""

    def __init__(self, tasks: Sequence[Task], job: Job, cluster: Cluster) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._job = job
        self.chunks = _chunks(tasks, 4 * cluster.num_cpus)

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
        job = self._job
        return lambda: sample_blocks(_rows(chunk, job.config), job.rows_per_block)


class _PixelSource(_Source):
    def _reader(self, chunk: list[tuple[int, Task]]) -> Callable[[], Iterator[pa.Table]]:
        job = self._job
        return lambda: pixel_blocks(_rows(chunk, job.config), job.info.transform, job.config.input, job.rows_per_block)


def _read(source: _Source, num_cpus: float) -> Dataset:
    return read_datasource(  # type: ignore[no-any-return]
        source, num_cpus=num_cpus, override_num_blocks=len(source.chunks)
    )


def _rows(chunk: list[tuple[int, Task]], config: JobConfig) -> Iterator[Any]:
    store = Store(config.input_storage)
    for number, task in chunk:
        yield from read_rows(number, task.shard, config.input, store)


def _decode_block(block: pa.Table, job: Job) -> Iterator[pa.Table]:
    yield from pixel_blocks(rows_of(block), job.info.transform, job.config.input, job.rows_per_block)


def _chunks(tasks: Sequence[Task], at_least: int) -> list[list[tuple[int, Task]]]:
    """The numbered tasks in consecutive runs: enough of them for every core, none larger than need be."""
    total = sum(task.shard.size for task in tasks)
    limit = min(READ_TASK_BYTES, total / at_least)
    chunks: list[list[tuple[int, Task]]] = []
    size = limit + 1.0
    for number, task in enumerate(tasks):
        if size + task.shard.size > limit:
            chunks.append([])
            size = 0
        chunks[-1].append((number, task))
        size += task.shard.size
    return chunks


# --- What the driver does meanwhile ----------------------------------------------------------------------------------


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class Committer:
    """Reads what is in a piece, and commits shards. A long-lived actor: a task per block costs 30 % of the rate."""

    def __init__(self, source: Store, context: CommitContext) -> None:
        self._source, self._context = source, context

    def describe(self, *blocks: pa.Table) -> list[Receipt]:
        """The receipts of these blocks; `piece` is the block's place among the arguments."""
        return [receipt for place, block in enumerate(blocks) for receipt in describe(block, place)]

    def commit(self, decision: Commit, task: Task) -> Committed:
        return commit_shard(
            CommitTask(
                number=decision.shard,
                shard_url=task.shard.url,
                shard_id=task.shard.id,
                fingerprint=task.shard.fingerprint,
                num_rows=decision.num_rows,
                pieces=decision.pieces,
                retires=task.retires,
                last_path=task.last_path,
            ),
            self._context,
            fetch=ray.get,
            source_fingerprint=lambda: current_fingerprint(task.shard, self._source),
        )


@dataclass(frozen=True)
class Open:
    """A shard that stays open after this run, and why."""

    task: Task
    reason: str


class Run:
    """One run of the flow over the tasks of a plan."""

    def __init__(
        self, tasks: Sequence[Task], job: Job, context: CommitContext, cluster: Cluster, watcher: Watcher
    ) -> None:
        self._tasks, self._watcher = tasks, watcher
        self._progress = Progress(len(tasks), {n: t.after for n, t in enumerate(tasks) if t.after is not None})
        source = Store(job.config.input_storage)
        strategy = {"scheduling_strategy": "SPREAD", "max_concurrency": 2 * MAX_COMMITS}
        self._committers = [
            Committer.options(**strategy).remote(source, context)  # type: ignore[attr-defined]
            for _ in range(min(cluster.num_nodes, 16))
        ]
        self._pending: dict[Any, Callable[[Any], None]] = {}  # what is under way, and what its answer is for
        self._commits = 0
        self._turn = 0
        self._bundles: queue.Queue[Any] = queue.Queue(maxsize=64)
        self._stopping = threading.Event()
        self.open: list[Open] = []

    def loop(self, dataset: Dataset) -> None:
        """Until every shard is committed or given up. On Ctrl-C or SIGTERM, what is being committed is finished."""
        pump = threading.Thread(target=self._pump, args=(dataset,), daemon=True)
        pump.start()
        try:
            finished = False
            while not finished or self._pending:
                finished = finished or self._take_bundles(wait=not self._pending)
                self._handle_answers(timeout_s=0.1)
                self._watcher.on_tick()
        except KeyboardInterrupt:
            self._stopping.set()
            self._finish_commits()
            raise
        finally:
            self._stop(pump)
            for number in self._progress.unsettled():
                self._open(number, "the run ended before it was complete")

    def _stop(self, pump: threading.Thread) -> None:
        """End an execution that nobody reads any more; in a cluster that goes on it would keep its actors."""
        self._stopping.set()
        deadline = time.monotonic() + PUMP_GRACE_S
        while pump.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self._bundles.get(timeout=0.1)

    def _pump(self, dataset: Dataset) -> None:
        """Hand the references to finished blocks to the loop, which may be busy: Ray Data blocks while it waits."""
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                if self._stopping.is_set():
                    return
                self._bundles.put([entry.ref for entry in bundle.blocks])
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is waited for
            self._bundles.put(error)
        else:
            self._bundles.put(None)

    def _take_bundles(self, wait: bool) -> bool:
        """Send what has arrived to be described. True once there is no more."""
        while self._commits < MAX_COMMITS * len(self._committers):
            try:
                refs = self._bundles.get(block=wait, timeout=0.2)
            except queue.Empty:
                return False
            wait = False
            if refs is None:
                return True
            if isinstance(refs, BaseException):
                raise readable(refs)
            if refs:
                described = self._committer().describe.remote(*refs)
                self._pending[described] = partial(self._on_receipts, refs)
        return False

    def _committer(self) -> Any:
        self._turn += 1
        return self._committers[self._turn % len(self._committers)]

    def _handle_answers(self, timeout_s: float) -> None:
        if not self._pending:
            return
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout_s)
        for ref in ready:
            self._pending.pop(ref)(ref)

    def _on_receipts(self, refs: list[Any], answer: Any) -> None:
        for receipt in ray.get(answer):
            self._watcher.on_rows(len(receipt.indices), receipt.errors)
            self._act(self._progress.on_receipt(replace(receipt, piece=refs[receipt.piece])))

    def _act(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Abandon):
                self._open(decision.shard, decision.reason)
                continue
            self._commits += 1
            committing = self._committer().commit.remote(decision, self._tasks[decision.shard])
            self._pending[committing] = partial(self._on_commit, decision.shard)

    def _on_commit(self, number: int, answer: Any) -> None:
        self._commits -= 1
        try:
            committed: Committed = ray.get(answer)
        except Exception as cause:
            error = readable(cause)
            if isinstance(error, ModelMismatch):
                raise error from cause
            self._open(number, str(error))
            self._act(self._progress.on_failed(number))
            return
        self._watcher.on_committed(self._tasks[number], committed)
        self._act(self._progress.on_committed(number))

    def _open(self, number: int, reason: str) -> None:
        self.open.append(Open(self._tasks[number], reason))
        self._watcher.on_open(self._tasks[number], reason)

    def _finish_commits(self) -> None:
        deadline = time.monotonic() + STOP_GRACE_S
        while self._commits and time.monotonic() < deadline:
            self._handle_answers(timeout_s=0.2)


def readable(error: BaseException) -> BaseException:
    """Our own error inside what Ray wraps around it, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)  # what a RayTaskError, itself of the cause's class, was made of
        if isinstance(cause, PipelineError) and inner is None:
            return cause
        cause = inner or cause.__cause__
    return error
