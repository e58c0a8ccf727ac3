"""What is there to do: the listing of the input against the ledger of the output. Opens no shard.

Groups of loose files need an order, so that a file never stands in two parts. It rests on one rule, which every commit
keeps: a part of a group holds no file from the first path of the next group that stands on. So only two kinds of old
groups can hold files that a group is about to take:

- those that begin among its files; the listing has them no more, and they MUST be retired first
- where it does not stand itself, the one that stands next before it, which MUST be retired first if the listing has it
  no more, and else, if it is to do as well, be committed (and so shrink) first

So a sample may be absent for a moment, but never stands twice.
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
    listed = list(shards)
    old = _OldGroups({s.url: s.id for s in listed if s.kind == "files" and s.id in standing}, vanished)
    todo: list[tuple[Shard, str | None, tuple[str, ...]]] = []
    done: list[Shard] = []
    for shard in listed:
        before, retires = old.around(shard) if shard.kind == "files" else (None, ())
        # A group may be done and a vanished one stand among its files: a rival's late write has brought it back.
        if _fingerprint(standing, shard.id) == shard.fingerprint and not retires:
            done.append(shard)
        else:
            todo.append((shard, before, retires))
    places: dict[str | None, int] = {shard.id: place for place, (shard, _, _) in enumerate(todo)}
    return Plan(
        tasks=[Task(shard, places.get(before), retires) for shard, before, retires in todo],
        done=done,
        changed=[shard.url for shard, _, _ in todo if shard.id in standing],
        gone=sorted(standing.keys() - {shard.id for shard in listed}),
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
    urls = dataset.shard_urls({name: found for name, found in standing.items() if name not in listed})
    return {name: url for name, url in urls.items() if url.startswith(roots)}


class _OldGroups:
    """The groups that stand in the dataset, by URL, and so in the order of their first paths."""

    def __init__(self, listed: Mapping[str, str], vanished: Mapping[str, str]) -> None:
        self._vanished = vanished
        self._ids = dict(listed) | {url: name for name, url in vanished.items()}
        self._urls = sorted(self._ids)

    def around(self, shard: Shard) -> tuple[str | None, tuple[str, ...]]:
        """The old group that may hold the beginning of this one, and all that must be retired before it."""
        prefix = f"{shard.root}#"
        last = prefix + relative(shard.root, shard.members[-1].url)
        begin, end = bisect.bisect_left(self._urls, shard.url), bisect.bisect_right(self._urls, last)
        before = None
        if shard.url not in self._ids and begin and self._urls[begin - 1].startswith(prefix):
            before = self._ids[self._urls[begin - 1]]
        sources = [self._ids[url] for url in self._urls[begin:end]] + ([before] if before else [])
        return before, tuple(name for name in sources if name in self._vanished)
