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
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.config import JobConfig
from pipeline.inputs.shards import Shard, discover, relative
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import Standing
from pipeline.outputs.schema import Footer
from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to do. `after` is the place in the plan of a group whose commit must come first; `retires` are ids of
    vanished groups whose files this one takes."""

    shard: Shard
    after: int | None = None
    retires: tuple[str, ...] = ()

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
    done: list[Shard] = field(default_factory=list)  # committed with the present fingerprint
    changed: list[str] = field(default_factory=list)  # URLs among the tasks that stand with another fingerprint
    gone: list[str] = field(default_factory=list)  # ids that stand in the dataset and are not in the input

    @property
    def num_bytes(self) -> int:
        """The size of what is to do."""
        return sum(task.shard.size for task in self.tasks)


def make_plan(config: JobConfig) -> Plan:
    """List input and output and compare them.

    Raises ConfigError for an empty listing, and what the store answers where it cannot be listed.
    """
    shards = discover(config.input, Store(config.input_storage))
    dataset = Dataset(config.output.url, Store(config.output_storage))
    standing = dataset.standing()
    return compare(shards, standing, _vanished_groups(shards, standing, dataset))


def _vanished_groups(shards: list[Shard], standing: Mapping[str, Standing], dataset: Dataset) -> list[Vanished]:
    """The groups in the dataset that the listing has no more; only asked for where there are groups."""
    roots = {shard.root for shard in shards if shard.kind == "files"}
    if not roots:
        return []
    listed = {shard.id for shard in shards}
    found = dataset.footers_of({name: stands for name, stands in standing.items() if name not in listed})
    return [group for name, footers in found.items() for group in vanished_groups(name, footers, roots)]


def vanished_groups(shard_id: str, footers: Iterable[Footer], roots: Iterable[str]) -> Iterator[Vanished]:
    """A part and an errors part as groups of these roots; they may be of two times, and so reach to two paths."""
    for footer in footers:
        for root in roots:
            if footer.shard.startswith(f"{root}#"):
                yield Vanished(shard_id, root, footer.shard.removeprefix(f"{root}#"), footer.last_path)


def compare(shards: Iterable[Shard], standing: Mapping[str, Standing], vanished: Iterable[Vanished] = ()) -> Plan:
    """The plan, as a pure function."""
    listed = list(shards)
    standing_urls = sorted(shard.url for shard in listed if shard.kind == "files" and shard.id in standing)
    old = _ByRoot(vanished)
    todo: dict[str, tuple[Shard, tuple[str, ...]]] = {}
    done: list[Shard] = []
    for shard in listed:
        retires = old.among(shard) if shard.kind == "files" else ()
        # A group may be done and a vanished one reach among its files: a rival that planned before us wrote it later.
        if _fingerprint(standing, shard.id) == shard.fingerprint and not retires:
            done.append(shard)
        else:
            todo[shard.url] = shard, retires
    places = {url: place for place, url in enumerate(todo)}
    return Plan(
        tasks=[Task(shard, places.get(_before(shard, standing_urls)), retires) for shard, retires in todo.values()],
        done=done,
        changed=[shard.url for shard, _ in todo.values() if shard.id in standing],
        gone=sorted(standing.keys() - {shard.id for shard in listed}),
    )


def _fingerprint(standing: Mapping[str, Standing], shard_id: str) -> str | None:
    found = standing.get(shard_id)
    return found.fingerprint if found else None


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
