"""What a dataset is and how much it holds, from listings and the marks; opens no part."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import FatalError, NotFound, clean
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store

LAST_RUNS = 5
SHOWN = ("run_id", "started_at", "exit_code", "message", "predicted", "errors", "seconds", "images_per_s")


@dataclass(frozen=True)
class Status:
    """`incomplete` are the ids of shards whose part, errors part and mark don't agree; a run does them again."""

    url: str
    model: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 0
    shards: int = 0
    predicted: int = 0
    errors: int = 0
    num_bytes: int = 0
    incomplete: list[str] = field(default_factory=list)
    last_runs: list[dict[str, Any]] = field(default_factory=list)


def read_status(url: str, store: Store) -> Status:
    """Raises NotFound where there is no dataset."""
    dataset = Dataset(url, store)
    identity = dataset.identity()
    if identity is None:
        raise NotFound(f"there is no dataset at {url}: it has no _dataset.json. Check the URL, or run a job first.")
    standing = dataset.standing()
    marks = [found.valid_mark for found in standing.values() if found.valid_mark is not None]
    try:
        counts = [(int(body["predicted"]), int(body["errors"])) for body in dataset.read_marks(marks)]
    except (ValueError, KeyError, TypeError) as cause:
        raise FatalError(
            f"a mark in {dataset.path('_ledger')} is damaged: {clean(cause)}. `resnet-batch verify {url}` names it."
        ) from cause
    return Status(
        url=url,
        model=identity["model"],
        num_classes=identity["num_classes"],
        shards=len(marks),
        predicted=sum(predicted for predicted, _ in counts),
        errors=sum(errors for _, errors in counts),
        num_bytes=sum(file.size for file in store.find(dataset.path("data"))),
        incomplete=sorted(name for name, found in standing.items() if found.valid_mark is None),
        last_runs=_last_runs(dataset),
    )


def _last_runs(dataset: Dataset) -> list[dict[str, Any]]:
    """The newest reports, newest first; run ids begin with the time."""
    urls = sorted(
        (f.url for f in dataset.store.find(dataset.path("_runs")) if f.url.endswith("/report.json")), reverse=True
    )
    return [_summary(dataset, url) for url in urls[:LAST_RUNS]]


def _summary(dataset: Dataset, url: str) -> dict[str, Any]:
    try:
        report = json.loads(dataset.store.read(url))
        return {name: report[name] for name in SHOWN}
    except (ValueError, KeyError, TypeError):
        nothing: dict[str, Any] = dict.fromkeys(SHOWN)
        return nothing | {"run_id": url.split("/")[-2], "message": "its report.json cannot be read"}
