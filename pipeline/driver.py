"""What the driver does while the graph runs: it turns receipts into commits.

It handles receipts and references only, never pixels or vectors. `Run.loop` is the flow of it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.exceptions import (
    GetTimeoutError,
    RayError,
)

from pipeline import witness
from pipeline.budget import ErrorBudget
from pipeline.cluster import Cluster
from pipeline.config import JobConfig, Precision
from pipeline.errors import ModelMismatch, PipelineError, Stopped, StoreFull, TransientError, clean
from pipeline.failures import readable
from pipeline.inputs.shards import current_fingerprint
from pipeline.outputs.commit import CommitContext, CommitTask, Committed, commit_shard, describe
from pipeline.outputs.progress import Abandon, Commit, Decision, Progress, Receipt
from pipeline.outputs.workspace import sweep_workspaces
from pipeline.planning import Task
from pipeline.storage import Store
from pipeline.timing import Spent
from pipeline.verdict import Usage, readers_at_once
from pipeline.witness import Casualties, RayNotes, Witness

if TYPE_CHECKING:  # committers don't need rich
    from pipeline.report import Counter

log = logging.getLogger(__name__)

MAX_COMMITTERS = 16
MAX_COMMITS = 16  # under way at once; more pieces than that wait in the object store
STOP_GRACE_S = 20.0
PUMP_GRACE_S = 5.0
ASK_S = 10.0
FETCH_S = 600.0  # in which a lost piece may have to be made again
# Arrow's usual allocator, mimalloc, takes pages of 2 MB for each thread that commits and gives them back after every
# commit: clearing them took as long as all the rest of it.
ALLOCATOR = next(name for name in ("jemalloc", "system") if name in pa.supported_memory_backends())
COMMITTER_ENV = {"env_vars": {"ARROW_DEFAULT_MEMORY_POOL": ALLOCATOR}}  # which Arrow reads once, when it is imported

Execute = Callable[[], tuple[Iterator[Any], Callable[[], None]]]  # see flow.execute


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3, runtime_env=COMMITTER_ENV)
class Committer(Witness):
    """Reads what is in a piece, and commits shards. A long-lived actor: a task per block costs 30 % of the rate.
    Outliving the workers, it is their witness as well."""

    def __init__(self, source: Store, context: CommitContext) -> None:
        super().__init__()
        self._source, self._context = source, context
        sweep_workspaces()
        pa.array([])  # pyarrow imports pandas at its first use: not when a first block waits

    def describe(self, *blocks: pa.Table) -> list[Receipt]:
        """The receipts of these blocks; `piece` is the block's place among the arguments."""
        return [receipt for place, block in enumerate(blocks) for receipt in describe(block, place)]

    def commit(self, decision: Commit, task: Task) -> Committed:
        committed = commit_shard(
            CommitTask(
                number=decision.shard,
                shard_url=task.shard.url,
                shard_id=task.shard.id,
                fingerprint=task.shard.fingerprint,
                num_rows=decision.num_rows,
                pieces=decision.pieces,
                retires=task.retires,
                replaces=task.replaces,
                last_path=task.last_path,
            ),
            self._context,
            fetch=_fetch,
            source_fingerprint=lambda: current_fingerprint(task.shard, self._source),
        )
        return replace(committed, is_ours=committed.is_ours or _is_second_life())


def _is_second_life() -> bool:
    """Whether this actor has died once: then it may have made a commit that stands, and not lived to tell. Asks Ray's
    control store, which would cost as much as a small commit if it were asked for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's, of what it uses itself
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _fetch(piece: Any) -> pa.Table:
    """A piece from Ray's object store. Raises TransientError after a while: in some 20,000 commits Ray was once seen to
    wait for ever for a piece that stood. Then the shard stays open, and the next run does it."""
    try:
        return ray.get(piece, timeout=FETCH_S)
    except GetTimeoutError as cause:
        raise TransientError(
            f"Ray did not hand out a finished piece of it within {FETCH_S:.0f} s. Run again."
        ) from cause


def num_committers(cluster: Cluster) -> int:
    return min(cluster.num_nodes, MAX_COMMITTERS)


class Run:
    """One run of the flow over the tasks of a plan."""

    def __init__(
        self, tasks: Sequence[Task], config: JobConfig, context: CommitContext, cluster: Cluster, watcher: Counter
    ) -> None:
        self._tasks, self._watcher = tasks, watcher
        self._progress = Progress(len(tasks), {n: t.after for n, t in enumerate(tasks) if t.after is not None})
        self._budget = ErrorBudget(config.input.max_errors, config.input.max_error_rate)
        self._casualties = Casualties()
        source = Store(config.input_storage)
        strategy = {"scheduling_strategy": "SPREAD", "max_concurrency": 2 * MAX_COMMITS}
        self._committers = [
            Committer.options(**strategy).remote(source, context)  # type: ignore[attr-defined]
            for _ in range(num_committers(cluster))
        ]
        self.notes = RayNotes(self._committers[0])
        self._pending: dict[Any, Callable[[Any], None]] = {}  # what is under way, and what its answer is for
        self._commits, self._max_commits = 0, MAX_COMMITS * len(self._committers)
        self._turn = 0
        self._began = time.monotonic()
        self._first_rows_at: float | None = None
        self._is_said = False
        self._write_s = 0.0  # in which nothing could go on but commits
        self._bundles: queue.Queue[Any] = queue.Queue(maxsize=64)
        self._stopping = threading.Event()
        self._end: Callable[[], None] = lambda: None  # ends the execution, once there is one

    def loop(self, execute: Execute) -> None:
        """Until every shard is committed or given up. `execute` starts what makes the pieces.

        On Ctrl-C or SIGTERM (KeyboardInterrupt), and where going on makes no sense (PipelineError), shards whose rows
        have all arrived are committed before it is raised.
        """
        pump = threading.Thread(target=self._pump, args=(execute,), daemon=True)
        pump.start()
        try:
            finished = False
            while not finished or self._pending:
                at, held_up = time.monotonic(), finished or self._commits >= self._max_commits
                finished = finished or self._take_bundles(wait=not self._pending)
                self._handle_answers(timeout_s=0.1)
                self._write_s += time.monotonic() - at if held_up else 0.0
                self._casualties.check()
                self._say_if_nothing_comes()
                self._watcher.on_tick()
        except (KeyboardInterrupt, PipelineError):
            self._end_execution()
            self._finish()
            raise
        finally:  # the report first: another signal may come while the pump is waited for
            self._watcher.on_unfinished([self._tasks[number] for number in self._progress.unsettled()])
            self._stop(pump)

    def usage(self, cluster: Cluster, actors: int, device: str, precision: Precision) -> Usage | None:
        """What the time since the run began went into. None where not one row has come, or the committer can't tell:
        no failure."""
        if self._first_rows_at is None or not self._watcher.images:
            return None
        try:
            spent: Spent = ray.get(self._committers[0].spent.remote(), timeout=ASK_S)
        except RayError as cause:
            log.warning("what bounded this run is not known: %s", clean(cause))
            return None
        return Usage(
            seconds=time.monotonic() - self._first_rows_at,
            start_up_s=self._first_rows_at - self._began,
            write_s=self._write_s,
            cores=cluster.num_cpus,
            shards=len(self._tasks),
            readers=readers_at_once([task.shard.size for task in self._tasks]),
            actors=cluster.actors_at_work(actors, device),
            device=device,
            precision=precision,
            spent=spent,
        )

    def _say_if_nothing_comes(self) -> None:
        """Once."""
        if self._first_rows_at or self._is_said or time.monotonic() - self._began < witness.SILENCE_S:
            return
        self._is_said = True
        witness.say_what_is_free("no rows")

    def _end_execution(self) -> None:
        """In a cluster that goes on, an execution that nobody reads any more would keep its actors."""
        self._stopping.set()
        self._end()

    def _stop(self, pump: threading.Thread) -> None:
        """Let the pump end, which may wait for room."""
        self._end_execution()
        deadline = time.monotonic() + PUMP_GRACE_S
        while pump.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self._bundles.get(timeout=0.1)

    def _pump(self, execute: Execute) -> None:
        """Hand the references to finished blocks to the loop, which may be busy: Ray Data blocks while it waits."""
        try:
            bundles, self._end = execute()
            if self._stopping.is_set():  # while it was started, so that nobody could end it
                self._end()
            for bundle in bundles:
                if self._stopping.is_set():
                    return
                self._bundles.put([entry.ref for entry in bundle.blocks])
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is waited for
            self._bundles.put(error)
        else:
            self._bundles.put(None)

    def _take_bundles(self, wait: bool) -> bool:
        """Send what has arrived to be described. True once there is no more."""
        while self._commits < self._max_commits:
            try:
                refs = self._bundles.get(block=wait, timeout=0.2)
            except queue.Empty:
                return False
            wait = False
            if refs is None:
                return True
            if isinstance(refs, BaseException):
                found = readable(refs)
                raise found from None if found is refs else refs
            self._casualties.on_progress()
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
        try:
            receipts: list[Receipt] = ray.get(answer)
        except RayError as cause:  # a committer that died again and again, or a piece that is lost
            if self._stopping.is_set():
                log.warning("finished rows are not committed: %s", clean(readable(cause)))
                return
            raise Stopped(f"finished rows cannot be read: {clean(readable(cause))}") from cause
        for receipt in receipts:
            if self._progress.is_news(receipt):
                self._first_rows_at = self._first_rows_at or time.monotonic()
                self._watcher.on_rows(len(receipt.indices), receipt.errors)
                self._stop_on(self._budget.spend(len(receipt.indices), receipt.errors))
            decisions = self._progress.on_receipt(replace(receipt, piece=refs[receipt.piece]))
            if decisions and self._progress.has_all():
                self._stop_on(self._budget.conclude())
            self._act(decisions)

    def _stop_on(self, excess: str | None) -> None:
        if excess and not self._stopping.is_set():
            raise Stopped(f"{excess}. Look at the source, or raise the limit.")

    def _act(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Abandon):
                self._watcher.on_open(self._tasks[decision.shard], decision.reason)
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
            self._watcher.on_open(self._tasks[number], str(error))
            self._act(self._progress.on_failed(number))
            if isinstance(error, StoreFull) and not self._stopping.is_set():
                raise error from cause
            return
        self._watcher.on_committed(self._tasks[number], committed)
        self._act(self._progress.on_committed(number))

    def _finish(self) -> None:
        """Commit what has arrived, within the grace that is left before a SIGKILL."""
        deadline = time.monotonic() + STOP_GRACE_S
        while (self._pending or not self._bundles.empty()) and time.monotonic() < deadline:
            with suppress(Exception):  # what an execution says that was broken off; the reason to stop counts
                self._take_bundles(wait=False)
            self._handle_answers(timeout_s=0.2)
