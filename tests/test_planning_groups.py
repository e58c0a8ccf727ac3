"""Groups of loose files, done in the order of the plan by runs that stop anywhere: no file ever stands in two."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backends import FileInfo
from pipeline.errors import TransientError
from pipeline.inputs.shards import Shard, group_files, relative
from pipeline.outputs.ledger import (
    Check,
    Confirm,
    Delete,
    Look,
    Mark,
    Put,
    Standing,
    Standings,
    Wait,
    commit_steps,
    marks_by_shard,
)
from pipeline.outputs.progress import Abandon, Commit, Decision, Progress, Receipt
from pipeline.outputs.schema import Footer
from pipeline.planning import Plan, Task, compare, vanished_groups

ROOT = "file:///in"
PATHS = [f"{folder}/{number}.jpg" for folder in "abc" for number in range(4)]
Files = dict[str, int]  # path to version


def is_broken(path: str, version: int) -> bool:
    return (PATHS.index(path) + version) % 4 == 0


def listing(files: Files, group_size: int) -> list[Shard]:
    infos = [FileInfo(f"{ROOT}/{path}", 1, str(version)) for path, version in files.items()]
    return list(group_files(ROOT, infos, group_size))


@dataclass
class Held:
    """A part or an errors part."""

    version: str
    footer: Footer
    files: Files


class Stopped(Exception):
    """A commit that can't go on."""


@dataclass
class World:
    """The input as it is now, and the dataset in memory, looked at after every write."""

    files: Files = field(default_factory=dict)
    data: dict[str, Held] = field(default_factory=dict)
    errors: dict[str, Held] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)
    writes: int = 0
    is_watched: bool = True

    def standing(self) -> Standings:
        marks = [mark for name in self.marks if (mark := Mark.parse(name))]
        versions = ({name: held.version for name, held in one.items()} for one in (self.data, self.errors))
        return Standings(marks_by_shard(marks), *versions)

    def plan(self, group_size: int) -> Plan:
        listed, standing = listing(self.files, group_size), self.standing()
        vanished = standing.keys() - {shard.id for shard in listed}
        return compare(listed, standing, [g for n in vanished for g in vanished_groups(n, self._footers(n), [ROOT])])

    def _footers(self, name: str) -> list[Footer]:
        """As `Dataset.footers` finds them."""
        return [held[name].footer for held in (self.data, self.errors) if name in held]

    def perform(self, step: Any, shard: Shard) -> Any:
        match step:
            case Look(name):
                return self.standing().get(name, Standing())
            case Check():
                planned = planned_files(shard)
                if any(self.files.get(path) != version for path, version in planned.items()):
                    raise Stopped("the source has changed")
                return None
            case Confirm() | Wait():
                return None
        self.writes += 1
        folder = {"data": self.data, "errors": self.errors}.get(step.folder)
        name = step.name.removesuffix(".parquet")
        match step:
            case Put("_ledger", mark):
                self.marks.add(mark)
            case Delete("_ledger", mark):
                self.marks.discard(mark)
            case Put():
                wanted = step.folder == "errors"
                files = {path: v for path, v in planned_files(shard).items() if is_broken(path, v) == wanted}
                footer = Footer(shard.url, shard.fingerprint, "", "", 0, 0, 0, Task(shard).last_path)
                folder[name] = Held(f"write {self.writes}", footer, files)
            case Delete():
                folder.pop(name, None)
        if self.is_watched:
            self.check_no_file_twice()
        return folder[name].version if folder and name in folder else None

    def check_no_file_twice(self) -> None:
        """Between an errors part and its part a file may stand in both, but never in those of two groups."""
        places = {(path, name) for held in (self.data, self.errors) for name in held for path in held[name].files}
        doubled = [path for path, count in Counter(path for path, _ in places).items() if count > 1]
        assert not doubled, f"{doubled} in {sorted(places)}"

    def check_complete(self) -> None:
        """Every file that is there stands once, as it is now. Of those that are gone, a part and an errors part may be
        of two times, where a run has died between them: no run can do them again."""
        found = Counter(
            (path, version, folder)
            for folder, parts in (("data", self.data), ("errors", self.errors))
            for held in parts.values()
            for path, version in held.files.items()
            if path in self.files
        )
        assert found == Counter((p, v, "errors" if is_broken(p, v) else "data") for p, v in self.files.items())


def planned_files(shard: Shard) -> Files:
    return {relative(ROOT, member.url): int(member.version) for member in shard.members}


class Run:
    """One run over a plan, a step at a time: receipts in any order, commits side by side, any of them may fail."""

    def __init__(self, world: World, group_size: int, choice: random.Random, trouble: float) -> None:
        self._world, self._choice, self._trouble = world, choice, trouble
        self.tasks = world.plan(group_size).tasks
        after = {number: task.after for number, task in enumerate(self.tasks) if task.after is not None}
        self._progress = Progress(len(self.tasks), after)
        self._to_read = list(range(len(self.tasks)))
        self._commits: dict[int, Any] = {}
        choice.shuffle(self._to_read)

    @property
    def is_over(self) -> bool:
        return not self._to_read and not self._commits

    def step(self) -> None:
        number = self._choice.choice(self._to_read + list(self._commits))
        if number in self._commits:
            self._advance(number)
        else:
            self._to_read.remove(number)
            down = "the store is down" if self._has_trouble() else None
            size = len(self.tasks[number].shard.members)
            self._act(self._progress.on_receipt(Receipt(number, np.arange(size), 0, None, size, down)))

    def _has_trouble(self) -> bool:
        return self._choice.random() < self._trouble

    def _act(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Commit):
                shard, retires = self.tasks[decision.shard].shard, self.tasks[decision.shard].retires
                has_errors = any(is_broken(path, version) for path, version in planned_files(shard).items())
                steps = commit_steps(shard.id, shard.fingerprint, has_errors, retires)
                self._commits[decision.shard] = (steps, None)
            else:
                assert isinstance(decision, Abandon)

    def _advance(self, number: int) -> None:
        steps, answer = self._commits[number]
        try:
            if self._has_trouble():
                raise Stopped("the store is down")
            self._commits[number] = steps, self._world.perform(steps.send(answer), self.tasks[number].shard)
        except StopIteration:
            del self._commits[number]
            self._act(self._progress.on_committed(number))
        except (Stopped, TransientError):
            del self._commits[number]
            self._act(self._progress.on_failed(number))


SOME_PATHS = st.sets(st.sampled_from(PATHS), max_size=5)
GROUP_SIZES = st.sampled_from([2, 3, 4])


@st.composite
def nights(draw: st.DrawFn) -> list[tuple[set[str], set[str], int]]:
    """What happens from run to run: files that come or go, files that change, and, rarely, another group size."""
    size = draw(GROUP_SIZES)
    sizes = st.one_of(st.just(size), st.just(size), GROUP_SIZES)
    return draw(st.lists(st.tuples(SOME_PATHS, SOME_PATHS, sizes), min_size=1, max_size=6))


def edit(files: Files, toggled: set[str], bumped: set[str]) -> None:
    for path in sorted(toggled):
        if files.pop(path, None) is None:
            files[path] = 1
    for path in bumped & files.keys():
        files[path] += 1


def run_to_the_end(world: World, runs: list[Run], choice: random.Random, steps: int = 10**9, edits: float = 0) -> None:
    """Let the runs take turns until they are over, or for so many steps; the input may change meanwhile."""
    for _ in range(steps):
        going = [run for run in runs if not run.is_over]
        if not going:
            return
        choice.choice(going).step()
        if choice.random() < edits:
            edit(world.files, {choice.choice(PATHS)}, {choice.choice(PATHS)})


def check_next_run(world: World, group_size: int, choice: random.Random) -> None:
    """One more run that nobody disturbs makes all complete, and leaves nothing to do."""
    run_to_the_end(world, [Run(world, group_size, choice, trouble=0)], choice)
    world.check_complete()
    assert world.plan(group_size).tasks == []


@settings(max_examples=800)
@given(nights(), st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.2]), st.integers(1, 2))
def test_no_file_ever_stands_twice(
    nights: list[tuple[set[str], set[str], int]], seed: int, trouble: float, at_once: int
):
    """Runs that stop anywhere, two at once with the same listing, and an input that changes while they run."""
    choice, world = random.Random(seed), World()
    edit(world.files, set(choice.sample(PATHS, 8)), set())
    for toggled, bumped, group_size in nights:
        edit(world.files, toggled, bumped)
        runs = [Run(world, group_size, choice, trouble) for _ in range(at_once)]
        run_to_the_end(world, runs, choice, choice.choice([choice.randrange(60), 10**9]), trouble / 4)
    check_next_run(world, nights[-1][2], choice)


@settings(max_examples=300)
@given(nights(), st.integers(0, 2**32))
def test_what_two_runs_with_two_listings_leave_is_put_right_by_the_next(
    nights: list[tuple[set[str], set[str], int]], seed: int
):
    """Here a file may stand twice for a while: a slow run commits a group that another one has split since. (And one
    that is gone from the input may do so until it is pruned.)"""
    choice, world = random.Random(seed), World(is_watched=False)
    edit(world.files, set(choice.sample(PATHS, 8)), set())
    runs: list[Run] = []
    for toggled, bumped, group_size in nights:
        runs = [*runs[-2:], Run(world, group_size, choice, trouble=0)]
        run_to_the_end(world, runs, choice, choice.randrange(40))
        edit(world.files, toggled, bumped)
    run_to_the_end(world, runs, choice)
    check_next_run(world, nights[-1][2], choice)


def test_a_tar_whose_name_goes_on_from_a_root_is_no_group() -> None:
    """Its rows, when it has gone, are not those of a group whose files another takes."""
    tar = Footer(f"{ROOT}#2024.tar", "", "", "", 0, 0, 0)
    group = Footer(f"{ROOT}#a.jpg", "", "", "", 0, 0, 0, "b.jpg")
    assert [found.id for footer in (tar, group) for found in vanished_groups(footer.shard, [footer], [ROOT])] == [
        group.shard
    ]
