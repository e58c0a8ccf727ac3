"""Shards that stand in the dataset and are gone from the input: shown, and on request taken out of the dataset."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.config import JobConfig
from pipeline.errors import NotFound, redact
from pipeline.inputs.shards import shard_id
from pipeline.missing import record_pruned
from pipeline.outputs.commit import retire_shard
from pipeline.outputs.dataset import NOT_OURS, Dataset
from pipeline.outputs.ledger import Standing
from pipeline.outputs.schema import Footer
from pipeline.planning import make_plan, model_and_dataset
from pipeline.storage import side_by_side


@dataclass
class Gone:
    """A shard that is gone from the input, as its mark or its part tells. `kept` says why it is not to be removed."""

    id: str
    shard: str = ""  # URL
    predicted: int = 0
    errors: int = 0
    kept: str = ""
    removed: bool = False


@dataclass
class Pruned:
    """All that is gone from the input, sorted by id."""

    url: str
    gone: list[Gone] = field(default_factory=list)

    @property
    def removed(self) -> list[Gone]:
        return [gone for gone in self.gone if gone.removed]

    @property
    def removable(self) -> list[Gone]:
        """What a prune with `yes` would remove."""
        return [gone for gone in self.gone if not gone.kept and not gone.removed]


def prune_dataset(config: JobConfig, yes: bool) -> Pruned:
    """See `pipeline.api.prune`."""
    _, dataset = model_and_dataset(config)
    plan = make_plan(config)
    listed = {*plan.done, *(task.shard.url for task in plan.tasks)}
    regrouped = {name for task in plan.tasks for name in task.retires}
    now = dataset.standing() if plan.gone else {}
    standing = {name: now[name] for name in plan.gone if name in now}
    footers = side_by_side(lambda name: _footers(dataset, name, standing[name]), standing)
    found = [_gone(name, standing[name], said, listed) for name, said in zip(standing, footers, strict=True)]
    for gone in found:
        if gone.id in regrouped:
            gone.kept = "its files are in other groups now: a run puts these in its place"
    if yes and (removable := [gone.shard for gone in found if not gone.kept]):
        record_pruned(dataset, removable)  # first, since a prune may die
        side_by_side(lambda gone: _remove(dataset, gone, standing[gone.id]), found)
    return Pruned(config.output.url, found)


def _footers(dataset: Dataset, name: str, standing: Standing) -> list[Footer]:
    """What the part and the errors part of a shard say of themselves, or marks that stand alone."""
    found = dataset.footers(name, standing)
    for mark in standing.marks if not found else ():
        with suppress(NotFound, *NOT_OURS):
            found.append(Footer(**dataset.read_mark(mark)))
    return found


def _gone(name: str, standing: Standing, footers: list[Footer], listed: Collection[str]) -> Gone:
    """Only what says itself that it is this shard may be removed: other files may lie in these folders."""
    for footer in footers:
        if footer.shard in listed:
            return Gone(name, redact(footer.shard), kept="it says that it is a shard of the input; made by hand?")
    ours = [footer for footer in footers if shard_id(footer.shard) == name]
    if not ours:
        return Gone(name, kept="nothing tells that it is ours: look at it, and delete it by hand")
    predicted = ours[0].predicted if standing.part is not None else 0
    return Gone(name, redact(ours[0].shard), predicted, ours[0].errors if standing.errors is not None else 0)


def _remove(dataset: Dataset, gone: Gone, shown: Standing) -> None:
    if gone.kept:
        return
    gone.removed = retire_shard(dataset, gone.id, shown)
    if not gone.removed:
        gone.kept = "another run has written it meanwhile: look again"
