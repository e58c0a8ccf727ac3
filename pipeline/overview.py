"""What a dataset is, how much it holds and what of its input is gone, from listings and the marks; opens no part.

And where its rows came from: the config of the last run, and the shards of that input as they are now.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import JobConfig, make_config
from pipeline.errors import ConfigError, FatalError, PipelineError, clean
from pipeline.inputs.shards import Keep, Shard, discover
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store

REPORT = "report.json"
LAST_RUNS = 5
INPUT_DEADLINE_S = 20.0  # of a call to the input's store: an input that is down must not keep the rest from being shown
SHOWN = ("run_id", "started_at", "exit_code", "message", "predicted", "errors", "seconds", "images_per_s")


@dataclass(frozen=True)
class Status:
    """`incomplete` are the ids of shards whose part, errors part and mark don't agree; a run does them again.
    `gone` are those that the input has no more; `note` says why that is not known, where it is not."""

    url: str
    model: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 0
    shards: int = 0
    predicted: int = 0
    errors: int = 0
    num_bytes: int = 0
    incomplete: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    note: str = ""
    last_runs: list[dict[str, Any]] = field(default_factory=list)


def read_status(dataset: Dataset, config: JobConfig | None = None) -> Status:
    """What is gone is told by the input of this config or of the last run's. Raises NotFound where there is no
    dataset."""
    identity = dataset.known_identity()
    standing = dataset.standing()
    marks = [found.valid_mark for found in standing.values() if found.valid_mark is not None]
    try:
        counts = [(int(body["predicted"]), int(body["errors"])) for body in dataset.read_marks(marks)]
    except (ValueError, KeyError, TypeError) as cause:
        raise FatalError(
            f"a mark in {dataset.path('_ledger')} is damaged: {clean(cause)}."
            f" `resnet-batch verify {dataset.url}` names it."
        ) from cause
    reports = run_files(dataset, REPORT)
    listed, why = listed_now(dataset, config, "status", reports)
    return Status(
        url=dataset.url,
        model=identity["model"],
        num_classes=identity["num_classes"],
        shards=len(marks),
        predicted=sum(predicted for predicted, _ in counts),
        errors=sum(errors for _, errors in counts),
        num_bytes=sum(file.size for file in dataset.store.each_below(dataset.path("data"))),
        incomplete=sorted(name for name, found in standing.items() if found.valid_mark is None),
        gone=sorted(standing.keys() - {shard.id for shard in listed}) if listed is not None else [],
        note=f"what is gone from the input is not known: {why}" if listed is None else "",
        last_runs=[_summary(dataset, url) for url in reports[:LAST_RUNS]],
    )


def listed_now(
    dataset: Dataset, config: JobConfig | None, who: str, reports: list[str] | None = None, keep: Keep | None = None
) -> tuple[list[Shard] | None, str]:
    """The shards of this config's input, or the last run's, as they are now, those that `keep` takes (see `discover`);
    or None, and why that cannot be told to `who` asks."""
    try:
        config = config or last_config(dataset, who, reports)
        options = config.input_storage
        options = options.model_copy(update={"deadline_s": min(options.deadline_s, INPUT_DEADLINE_S)})
        return discover(config.input, Store(options), keep, config.output.url), ""
    except PipelineError as cause:
        return None, str(cause)


def last_config(dataset: Dataset, who: str, reports: list[str] | None = None) -> JobConfig:
    """The config of the last run. Raises ConfigError, with the name of `who` asks, where no report tells it."""
    reports = run_files(dataset, REPORT) if reports is None else reports
    if not reports:
        raise ConfigError(
            f"{who} takes the config that the rows were made with, and no report tells how they were made."
            " Give --config."
        )
    try:
        report = json.loads(dataset.store.read(reports[0]))
        return make_config(report["config"])
    except (ConfigError, ValueError, KeyError, TypeError) as cause:
        raise ConfigError(
            f"{who} takes the config of the last run, {reports[0]}: {clean(cause)}. Give --config."
        ) from cause


def listed_shards(config: JobConfig) -> dict[str, Shard]:
    """The shards of the input by id; an input that is empty now has none."""
    lenient = config.input.model_copy(update={"allow_empty": True})
    found = discover(lenient, Store(config.input_storage), output=config.output.url)
    return {shard.id: shard for shard in found}


def run_files(dataset: Dataset, *names: str) -> list[str]:
    """The URLs of the files of these names that runs have left, newest first: run ids begin with the time."""
    found = dataset.store.each_below(dataset.path("_runs"))
    return sorted((file.url for file in found if file.url.rpartition("/")[2] in names), reverse=True)


def _summary(dataset: Dataset, url: str) -> dict[str, Any]:
    try:
        report = json.loads(dataset.store.read(url))
        return {name: report[name] for name in SHOWN}
    except (ValueError, KeyError, TypeError):
        nothing: dict[str, Any] = dict.fromkeys(SHOWN)
        return nothing | {"run_id": url.split("/")[-2], "message": "its report.json cannot be read"}
