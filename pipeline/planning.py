"""What is there to do: the listing of the input against the ledger of the output. Opens no shard.

Groups of loose files need an order, so that a file never stands in two parts:

- What stands of a group that the listing has no more, and reaches among the files of a listed one, MUST be retired
  before that one is committed.
- A part reaches no further than the next listed group that stands, a rule that every commit keeps. So a group that does
  not stand itself can only take files from the one that stands next before it: if that one is to do as well, it MUST be
  committed, and so shrink, first.

So a sample may be absent for a moment, but never stands twice.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pipeline.calibration import with_network
from pipeline.config import JobConfig
from pipeline.error_classes import ERROR_CLASSES, choose_classes
from pipeline.errors import AccessDenied, ConfigError, NotFound, redact
from pipeline.estimation import Estimate
from pipeline.inputs.shards import Shard, discover, relative
from pipeline.model.spec import ModelSpec, make_spec
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import NOTHING, Standing
from pipeline.outputs.schema import Footer
from pipeline.storage import Store, side_by_side
from pipeline.urls import canonical, is_local, local_path


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to do. `after` is the place in the plan of a group whose commit must come first; `retires` are ids of
    vanished groups whose files this one takes; `replaces` is the commit that a redo for its error rows replaces."""

    shard: Shard
    after: int | None = None
    retires: tuple[str, ...] = ()
    replaces: str | None = None

    @property
    def last_path(self) -> str:
        """Where the files of a group end. A name that is not UTF-8 can't be written: then a path behind it."""
        return (
            re.sub("[\ud800-\udfff].*", "\U0010ffff", _paths(self.shard)[1], flags=re.S) if self.shard.members else ""
        )


@dataclass(frozen=True, slots=True)
class Vanished:
    """A group that stands in the dataset and is not in the listing: its files lie between two paths, both included."""

    id: str
    root: str
    first_path: str
    last_path: str


@dataclass(frozen=True)
class Plan:
    """The tasks of this run, and what was found besides."""

    tasks: list[Task]
    done: list[str] = field(default_factory=list)  # URLs of what is committed with the present fingerprint
    changed: list[str] = field(default_factory=list)  # URLs among the tasks that stand with another fingerprint
    retried: list[str] = field(default_factory=list)  # URLs among the tasks that are done, but for their error rows
    gone: list[str] = field(default_factory=list)  # ids that stand in the dataset and are not in the input
    unlisted: list[str] = field(
        default_factory=list
    )  # loose files that end what tasks replace, and are not in the input
    estimate: Estimate | None = None  # of what the tasks will take, where that was asked for

    @property
    def num_bytes(self) -> int:
        """The size of what is to do."""
        return sum(task.shard.size for task in self.tasks)


def model_and_dataset(config: JobConfig) -> tuple[ModelSpec, Dataset]:
    """The model of a job and the dataset that it writes. Raises ModelMismatch where that is another model's,
    ConfigError where it is no place to write to."""
    _refuse_no_place(config.output.url)
    dataset = Dataset(config.output.url, Store(config.output_storage))
    spec = with_network(make_spec(config), dataset)
    dataset.check_identity({"model_fingerprint": spec.fingerprint, "model": spec.identity})
    return spec, dataset


def _refuse_no_place(url: str) -> None:
    if canonical(url).startswith("s3://"):
        return
    if not is_local(url):
        raise ConfigError(
            f"output.url: {redact(url)} cannot be written to: an output is a local folder or s3://bucket/prefix. Other"
            " stores can be read."
        )
    path = local_path(url)
    stands = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(stands):  # noqa: PTH112 - raises nothing
        what = (
            f"a link to {stands.readlink()}, where no folder can be reached"
            if stands.is_symlink()
            else "a file, not a folder"
        )
        raise ConfigError(f"output.url: {stands} is {what}. Choose another place.")


def make_plan(config: JobConfig, retry_errors: Iterable[str] | str = ()) -> Plan:
    """List input and output and compare them. With `retry_errors`, done shards with error rows of these classes are
    to be done again.

    Raises ConfigError for an empty listing and an unknown class, and what the store answers where it cannot be listed.
    """
    classes = choose_classes(retry_errors)
    dataset = Dataset(config.output.url, Store(config.output_storage))
    standing = dataset.standing()
    left_out: dict[str, str] = {}

    def is_worth_a_look(shard: Shard) -> bool:
        found = standing.get(shard.id, NOTHING)
        if found.fingerprint != shard.fingerprint or (classes and found.errors is not None):
            return True
        left_out[shard.id] = shard.url
        return False

    shards = discover(config.input, Store(config.input_storage), is_worth_a_look, config.output.url)
    redo = _with_errors(shards, standing, dataset, classes) if classes else ()
    vanished = _vanished_groups(shards, standing, left_out, dataset)
    plan = compare(shards, standing, vanished, redo, left_out)
    return replace(plan, unlisted=_unlisted(plan, shards, vanished, standing, dataset))


def refuse_a_selection(plan: Plan, config: JobConfig) -> None:
    """ConfigError where rows would leave the dataset of files that are still there: the input lists them no more.

    A group of loose files is replaced as a whole. That a file is still there tells a narrower `input.url` from files
    that are gone.
    """
    source = Store(config.input_storage)

    def is_there(url: str) -> bool:
        with suppress(NotFound, AccessDenied):
            source.info(url)
            return True
        return False

    there = [url for url, found in zip(plan.unlisted, side_by_side(is_there, plan.unlisted), strict=True) if found]
    if there:
        raise ConfigError(
            f"input.url: {redact(there[0])} is there but not in this input, and {config.output.url} holds its row in a"
            f" group of files that would be replaced ({len(there)} such groups). List all files of the folder that this"
            " dataset is to have, as before, or give this selection an output.url of its own."
        )


def _with_errors(
    shards: list[Shard], standing: Mapping[str, Standing], dataset: Dataset, classes: Collection[str]
) -> Collection[str]:
    """The ids of done shards that have error rows of these classes."""
    done = [shard.id for shard in shards if standing.get(shard.id, NOTHING).fingerprint == shard.fingerprint]
    candidates = [name for name in done if standing[name].errors is not None]
    if len(classes) == len(ERROR_CLASSES):
        return set(candidates)
    has_some = side_by_side(lambda name: not dataset.error_classes(name).isdisjoint(classes), candidates)
    return set(itertools.compress(candidates, has_some))


def _vanished_groups(
    shards: list[Shard], standing: Mapping[str, Standing], left_out: Collection[str], dataset: Dataset
) -> list[Vanished]:
    """The groups in the dataset that the listing has no more; only asked for where there are groups."""
    roots = {shard.root for shard in shards if shard.kind == "files"}
    if not roots:
        return []
    gone = _gone(shards, standing, left_out)
    found = dataset.footers_of({name: standing[name] for name in gone})
    return [group for name, footers in found.items() for group in vanished_groups(name, footers, roots)]


def _unlisted(
    plan: Plan,
    shards: Iterable[Shard],
    vanished: Iterable[Vanished],
    standing: Mapping[str, Standing],
    dataset: Dataset,
) -> list[str]:
    """Of each group that tasks replace or retire the first and the last file that the input has no more, if any."""
    retired = {name for task in plan.tasks for name in task.retires}
    roots = {group.id: group.root for group in vanished if group.id in retired}
    for shard in (task.shard for task in plan.tasks if task.shard.kind == "files"):
        if shard.id in standing and standing[shard.id].fingerprint != shard.fingerprint:
            roots[shard.id] = shard.root
    if not roots:
        return []
    listed = {member.url for shard in shards for member in shard.members}

    def ends(group: str) -> list[str]:
        left = sorted({f"{roots[group]}/{key}" for key in dataset.keys(group)} - listed)
        return [*left[:1], *left[-1:]]

    return sorted({url for urls in side_by_side(ends, roots) for url in urls})


def vanished_groups(shard_id: str, footers: Iterable[Footer], roots: Iterable[str]) -> Iterator[Vanished]:
    """A part and an errors part as groups of these roots; they may be of two times, and so reach to two paths."""
    for footer in footers:
        for root in roots:
            if footer.last_path and footer.shard.startswith(f"{root}#"):  # a shard of its own has no last path
                yield Vanished(shard_id, root, footer.shard.removeprefix(f"{root}#"), footer.last_path)


def compare(
    shards: Iterable[Shard],
    standing: Mapping[str, Standing],
    vanished: Iterable[Vanished] = (),
    redo: Collection[str] = (),
    left_out: Mapping[str, str] | None = None,
) -> Plan:
    """The plan, as a pure function. `redo` are ids of shards to do again though they are done; `left_out` are further
    shards that are listed and done, id to URL: of these there may be millions."""
    left_out = left_out or {}
    listed = list(shards)
    standing_urls = sorted(shard.url for shard in listed if shard.kind == "files" and shard.id in standing)
    old = _ByRoot(vanished)
    todo: list[Task] = []
    done: list[str] = []
    for shard in listed:
        retires = old.among(shard) if shard.kind == "files" else ()
        mark = standing.get(shard.id, NOTHING).valid_mark
        is_done = mark is not None and mark.fingerprint == shard.fingerprint
        replaces = mark.commit if mark is not None and is_done and shard.id in redo else None
        # A group may be done and a vanished one reach among its files: a rival that planned before us wrote it later.
        if is_done and not retires and replaces is None:
            done.append(shard.url)
        else:
            todo.append(Task(shard, None, retires, replaces))
    # What is only redone has its files already: nobody needs to wait for it.
    places = {
        task.shard.url: place for place, task in enumerate(todo) if task.shard.kind == "files" and task.replaces is None
    }
    return Plan(
        tasks=[replace(task, after=places.get(_before(task.shard, standing_urls))) for task in todo],
        done=sorted([*done, *left_out.values()]),
        changed=[task.shard.url for task in todo if task.shard.id in standing and task.replaces is None],
        retried=[task.shard.url for task in todo if task.replaces is not None],
        gone=_gone(listed, standing, left_out),
    )


def _gone(listed: Iterable[Shard], standing: Iterable[str], left_out: Collection[str]) -> list[str]:
    """The ids of what stands and is not in the input."""
    names = {shard.id for shard in listed}
    return sorted(name for name in standing if name not in names and name not in left_out)


def _paths(group: Shard) -> tuple[str, str]:
    """The path that names a group, and its last one. The first group's name is empty: it begins before all paths."""
    return group.url.removeprefix(f"{group.root}#"), relative(group.root, group.members[-1].url)


def _before(shard: Shard, standing_urls: list[str]) -> str:
    """The URL of the listed group that stands next before a group that does not; else nothing."""
    place = bisect.bisect_left(standing_urls, shard.url)
    stands = standing_urls[place : place + 1] == [shard.url]
    before = standing_urls[place - 1] if place and shard.kind == "files" and not stands else ""
    return before if before.startswith(f"{shard.root}#") else ""


class _ByRoot:
    """The vanished groups of each root, in the order of their first paths."""

    def __init__(self, vanished: Iterable[Vanished]) -> None:
        self._groups: dict[str, list[Vanished]] = {}
        for group in sorted(vanished, key=lambda group: group.first_path):
            self._groups.setdefault(group.root, []).append(group)
        # How far the groups up to each one reach: few overlap, so that looking backwards ends soon.
        self._reach = {
            root: list(itertools.accumulate((group.last_path for group in groups), max))
            for root, groups in self._groups.items()
        }

    def among(self, shard: Shard) -> tuple[str, ...]:
        """The ids of those that may hold files of this group."""
        groups, reach = self._groups.get(shard.root, []), self._reach.get(shard.root, [])
        first, last = _paths(shard)
        place = bisect.bisect_right(groups, last, key=lambda group: group.first_path)
        found: list[str] = []
        while place and reach[place - 1] >= first:
            place -= 1
            if groups[place].last_path >= first:
                found.append(groups[place].id)
        return tuple(dict.fromkeys(reversed(found)))
