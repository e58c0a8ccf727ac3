"""A run from config to report: plan, prepare the model, run the flow, say how it ended."""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.cluster import Cluster, connected
from pipeline.config import JobConfig
from pipeline.errors import ExitCode
from pipeline.model.spec import ModelSpec, make_spec
from pipeline.outputs.commit import CommitContext, Committed
from pipeline.outputs.dataset import Dataset, make_identity
from pipeline.planning import Plan, Task, make_plan
from pipeline.report import Counter, RunReport, public_config, watching
from pipeline.storage import Store

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


def run(config: JobConfig) -> RunReport:
    """Do what is new or changed; see `pipeline.api.run`."""
    started = time.monotonic()
    spec = make_spec(config)
    dataset = Dataset(config.output.url, Store(config.output_storage))
    dataset.check_identity({"model_fingerprint": spec.fingerprint, "model": spec.identity})
    plan = make_plan(config)
    dataset.store.sweep(dataset.url)
    report = _new_report(config, spec, plan)
    if plan.tasks:
        with connected(config) as cluster:
            _run(plan, config, spec, dataset, cluster, report)
    _conclude(report, len(plan.tasks))
    report.seconds = round(time.monotonic() - started, 3)
    dataset.store.put(dataset.path("_runs", report.run_id, "report.json"), report.to_json().encode())
    return report


def _new_report(config: JobConfig, spec: ModelSpec, plan: Plan) -> RunReport:
    now = datetime.now(UTC)
    return RunReport(
        run_id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}",
        output_url=config.output.url,
        model_fingerprint=spec.fingerprint,
        shards_listed=len(plan.tasks) + len(plan.done),
        shards_done_before=len(plan.done),
        shards_gone=len(plan.gone),
        started_at=now.isoformat(timespec="seconds"),
        config=public_config(config),
    )


def _run(plan: Plan, config: JobConfig, spec: ModelSpec, dataset: Dataset, cluster: Cluster, report: RunReport) -> None:
    from pipeline import flow

    job = flow.prepare(config, spec, cluster)
    settings = job.settings
    report.engine, report.device, report.batch_size = settings.engine, settings.device, settings.batch_size
    report.actors = job.num_actors
    classes = job.info.classes
    identity = make_identity(
        spec.identity, spec.fingerprint, list(classes) if classes is not None else None, job.info.num_classes
    )
    dataset.claim_identity(identity)
    context = CommitContext(dataset, identity, settings.columns, settings.engine)
    with watching(report, len(plan.tasks), plan.num_bytes) as counter:
        flow_run = flow.Run(plan.tasks, job, context, cluster, _Adapter(counter))
        try:
            with _terminable():
                flow_run.loop(flow.pieces(plan.tasks, job, cluster))
        except KeyboardInterrupt:
            report.message = "stopped on request"
        report.images_per_s = round(counter.images_per_s, 1)


class _Adapter:
    """Tells a counter, which knows URLs and sizes, what the flow says of tasks."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.on_rows = counter.on_rows
        self.on_tick = counter.on_tick

    def on_committed(self, task: Task, committed: Committed) -> None:
        self._counter.on_committed(task.shard.url, task.shard.size, committed)

    def on_open(self, task: Task, reason: str) -> None:
        self._counter.on_open(task.shard.url, task.shard.size, reason)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does. Installed after ray.init, which has a handler of its own that just exits."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(report: RunReport, num_tasks: int) -> None:
    if report.open:
        report.exit_code = ExitCode.INCOMPLETE
        stopped = f"{report.message}; " if report.message else ""
        report.message = (
            f"{stopped}{report.shards_committed} of {num_tasks} shards committed, {len(report.open)} stay open."
            " Run again: it does only these."
        )
    elif not num_tasks:
        report.message = "nothing to do: every shard is committed with its present content"
    elif report.errors and not report.predicted:
        report.exit_code = ExitCode.FAILED
        report.message = (
            f"not one prediction: all {report.errors} samples of {num_tasks} new shards are error rows."
            " Look at errors/*.parquet, and at input.format and input.url."
        )
    else:
        report.message = f"{report.shards_committed} shards committed"
