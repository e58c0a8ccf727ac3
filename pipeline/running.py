"""A run from config to report: plan, prepare the model, run the flow, say how it ended."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib import import_module

from pipeline.backends import deadline
from pipeline.cluster import Cluster, connected, terminable
from pipeline.config import JobConfig
from pipeline.errors import ExitCode, NotFound, PipelineError, TransientError, clean, redact
from pipeline.estimation import PREDICTION, is_about, score
from pipeline.model.classes import find_file
from pipeline.model.spec import ModelSpec, with_absolute_weights
from pipeline.outputs.commit import CommitContext
from pipeline.outputs.dataset import Dataset, make_identity
from pipeline.planning import Plan, make_plan, model_and_dataset, refuse_a_selection
from pipeline.report import RunReport, counted, new_run_id, public_config, watching
from pipeline.verdict import judge

log = logging.getLogger(__name__)

LEAVE_S = 10.0  # for the report: who has stopped the run may kill it soon


@terminable()
def run(config: JobConfig, retry_errors: Iterable[str] | str = ()) -> RunReport:
    """Do what is new or changed; see `pipeline.api.run`."""
    started = time.monotonic()
    spec, dataset = model_and_dataset(config)
    plan = make_plan(config, retry_errors)
    refuse_a_selection(plan, config)
    dataset.store.sweep(dataset.url)
    report = new_report(config, spec, plan)
    try:
        if plan.tasks:
            with connected(config) as cluster:
                _execute(plan, config, spec, dataset, cluster, report)
            dataset.store.sweep(dataset.url)  # what a committer left that died on the way
        _conclude(report)
        if plan.tasks and report.exit_code is not ExitCode.INCOMPLETE:
            report.prediction = _score(report, plan, dataset, time.monotonic() - started)
    except (KeyboardInterrupt, PipelineError) as cause:
        report.exit_code = getattr(cause, "exit_code", ExitCode.INCOMPLETE)
        report.message = redact(str(cause)) or "stopped on request"
        if report.shards_committed or report.exit_code is ExitCode.INCOMPLETE:  # not of what could never begin
            _leave(report, dataset, started)
        raise
    _leave(report, dataset, started)
    return report


def _score(report: RunReport, plan: Plan, dataset: Dataset, seconds: float) -> dict[str, float]:
    """What `plan --estimate` predicted of this run, if it did, beside what came of it."""
    sizes = [task.shard.size for task in plan.tasks]
    if not report.usage:  # it is not known what it had
        return {}
    had = {"model_fingerprint": report.model_fingerprint, "engine": report.engine, "device": report.device}
    had |= {name: report.usage[name] for name in ("cores", "actors")}
    try:
        prediction = json.loads(dataset.store.read(dataset.path(*PREDICTION)))
        if not isinstance(prediction, dict) or not is_about(prediction, sizes, had):
            return {}
        return score(prediction, seconds, report.images_per_s)
    except NotFound:
        return {}
    except (PipelineError, ValueError, KeyError, TypeError) as cause:
        log.warning("the prediction is not scored: %s", clean(cause))
        return {}


def _leave(report: RunReport, dataset: Dataset, started: float) -> None:
    """Put the report where it belongs. What the run committed stands without it, so that is not worth failing for."""
    report.seconds = round(time.monotonic() - started, 3)
    try:
        with deadline(LEAVE_S):
            dataset.store.put(dataset.path("_runs", report.run_id, "report.json"), report.to_json().encode())
    except PipelineError as cause:
        log.warning("this run leaves no report.json: %s", cause)


def new_report(config: JobConfig, spec: ModelSpec, plan: Plan) -> RunReport:
    """With a config that means the same in another folder: `verify` and others take it from there."""
    now = datetime.now(UTC)
    return RunReport(
        run_id=new_run_id(now),
        output_url=config.output.url,
        model_fingerprint=spec.fingerprint,
        shards_listed=len(plan.tasks) + len(plan.done),
        shards_done_before=len(plan.done),
        shards_gone=len(plan.gone),
        started_at=now.isoformat(timespec="seconds"),
        config=public_config(_with_absolute_files(config, spec)),
    )


def _with_absolute_files(config: JobConfig, spec: ModelSpec) -> JobConfig:
    """The job with the weights and class names that its spec was made of."""
    job = with_absolute_weights(config) if spec.weights.kind == "file" else config
    names = config.model.classes
    if not isinstance(names, str) or "://" in names:
        return job
    classes = str(find_file(names, config.directory, "model.classes"))
    return job.model_copy(update={"model": job.model.model_copy(update={"classes": classes})})


def _execute(
    plan: Plan, config: JobConfig, spec: ModelSpec, dataset: Dataset, cluster: Cluster, report: RunReport
) -> None:
    from pipeline.preparation import prepare

    import_ray_data = partial(import_module, "pipeline.flow")  # while a worker settles what it is asked
    job = prepare(config, spec, cluster, [task.shard for task in plan.tasks], meanwhile=import_ray_data)
    from pipeline import driver, flow

    spec, settings = job.spec, job.settings
    report.model_fingerprint = spec.fingerprint
    report.engine, report.device, report.batch_size = settings.engine, settings.device, settings.batch_size
    report.actors = job.num_actors
    log.info(
        "%s: engine %s on %s, batches of %d, %s",
        *(spec.name, settings.engine, settings.device, settings.batch_size, counted(job.num_actors, "actor")),
    )
    identity = make_identity(spec.identity, spec.fingerprint, job.info.classes, job.info.num_classes)
    if not dataset.store.honours_conditions(dataset.path("_runs", report.run_id, "probe")):
        log.warning(
            "%s takes conditional writes for plain ones: two first runs with different models at once could mix."
            " See to it that only one run writes there at a time",
            dataset.url,
        )
    dataset.claim_identity(identity)
    context = CommitContext(dataset, identity, settings.columns, settings.engine)
    with watching(report, len(plan.tasks), plan.num_bytes) as counter:
        driving = driver.Run(plan.tasks, config, context, cluster, counter)
        try:
            driving.loop(partial(flow.execute, flow.pieces(plan.tasks, job, cluster, driving.notes)))
            usage = driving.usage(cluster, job.num_actors, settings.device, spec.precision)
            if usage is not None:
                report.usage, report.verdict = asdict(usage), str(judge(usage))
        except KeyboardInterrupt:
            report.message = "stopped on request"
        except TransientError as reason:
            log.debug("%s", redact(traceback.format_exc()))  # a cause may name a URL that it was sent on to
            report.message = str(reason).rstrip(".")
        report.images_per_s = round(counter.images_per_s, 1)


def _conclude(report: RunReport) -> None:
    num_tasks = report.shards_listed - report.shards_done_before
    num_open = num_tasks - report.shards_committed
    if num_open:
        report.exit_code = ExitCode.INCOMPLETE
        stopped = f"{report.message}; " if report.message else ""
        report.message = (
            f"{stopped}{report.shards_committed:,} of {counted(num_tasks, 'shard')} committed, {num_open:,} left open."
            " Run again: it does only these."
        )
    elif not num_tasks:
        report.message = "nothing to do: every shard is committed with its present content"
    elif report.errors and not report.predicted:
        report.exit_code = ExitCode.FAILED
        report.message = (
            f"not one prediction: all {counted(report.errors, 'sample')} of {counted(num_tasks, 'shard')} are error"
            f" rows. `resnet-batch errors {redact(report.output_url)}` shows why; often input.format or input.image is"
            " wrong."
        )
    else:
        report.message = f"{counted(report.shards_committed, 'shard')} committed"
