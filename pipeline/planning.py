"""What is there to do: the listing of the input against the ledger of the output. Opens no shard.

Groups of loose files need an order. When a new file begins a group, the old group shrinks and the new one takes its
tail: the shrunk one is committed first. When a group's first file goes, its neighbour takes the rest: the group that
vanished is retired first. So a sample may be absent for a moment, but never stands twice.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.config import JobConfig
from pipeline.inputs.shards import Shard, discover, relative
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import Standing
from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to do. `after` is the place in the plan of a group whose commit must come first; `retires` are ids of
    vanished groups whose files this one takes."""

    shard: Shard
    after: int | None = None
    retires: tuple[str, ...] = ()


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


def compare(shards: Iterable[Shard], standing: Mapping[str, Standing], vanished: Mapping[str, str]) -> Plan:
    """The plan, as a pure function. `vanished` maps the ids of groups that are gone to their shard URLs."""
    listed = {shard.id: shard for shard in shards}
    todo = [s for s in listed.values() if _fingerprint(standing, s.id) != s.fingerprint]
    done = [s for s in listed.values() if _fingerprint(standing, s.id) == s.fingerprint]
    return Plan(
        tasks=_in_order(todo, listed.values(), standing, vanished),
        done=done,
        changed=[s.url for s in todo if s.id in standing],
        gone=sorted(standing.keys() - listed.keys()),
    )


def _fingerprint(standing: Mapping[str, Standing], shard_id: str) -> str | None:
    found = standing.get(shard_id)
    return found.fingerprint if found else None


def _vanished_groups(shards: list[Shard], standing: Mapping[str, Standing], dataset: Dataset) -> dict[str, str]:
    """Ids and URLs of groups in the dataset that the listing has no more; only asked for where there are groups."""
    roots = tuple({f"{shard.root}#" for shard in shards if shard.kind == "files"})
    if not roots:
        return {}
    listed = {shard.id for shard in shards}
    marks = [found.marks[0] for name, found in standing.items() if name not in listed and found.marks]
    bodies = zip(marks, dataset.read_marks(marks), strict=True)
    return {mark.shard_id: body["shard"] for mark, body in bodies if body["shard"].startswith(roots)}


def _in_order(
    todo: list[Shard], listed: Iterable[Shard], standing: Mapping[str, Standing], vanished: Mapping[str, str]
) -> list[Task]:
    places = {shard.id: place for place, shard in enumerate(todo)}
    rows = {s.url: s.id for s in listed if s.kind == "files" and s.id in standing}
    old = _OldGroups(rows | {url: name for name, url in vanished.items()})
    tasks = []
    for shard in todo:
        if shard.kind != "files":
            tasks.append(Task(shard))
            continue
        holder, taken = old.sources_of(shard)
        sources = [*taken, *([holder] if holder else [])]
        after = places.get(holder) if holder else None
        tasks.append(Task(shard, after, tuple(name for name in sources if name in vanished)))
    return tasks


class _OldGroups:
    """The groups that have rows in the dataset, by URL: each held the files from its first path to the next's."""

    def __init__(self, ids: Mapping[str, str]) -> None:
        self._ids = ids
        self._urls = sorted(ids)

    def sources_of(self, shard: Shard) -> tuple[str | None, list[str]]:
        """The old group that may have held the beginning of this shard, unless it is the shard itself, and the ones
        that began further on among its files."""
        prefix = f"{shard.root}#"
        last = prefix + relative(shard.root, shard.members[-1].url)
        begin, end = bisect.bisect_left(self._urls, shard.url), bisect.bisect_right(self._urls, last)
        inside = self._urls[begin:end]
        if inside and inside[0] == shard.url:
            return None, [self._ids[url] for url in inside[1:]]
        before = self._urls[begin - 1] if begin and self._urls[begin - 1].startswith(prefix) else None
        return (self._ids[before] if before else None), [self._ids[url] for url in inside]
