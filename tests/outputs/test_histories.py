"""All histories of two committers and one change of the source, with death after every step and one late write.

The steps are those that really run (`commit_steps`, `retire_steps`); the store is a small value. Wrong
orders of the same steps are planted too, and must be found by the same exploration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement, product
from typing import Any

import pytest

from pipeline.errors import TransientError
from pipeline.outputs.ledger import (
    Check,
    Confirm,
    Delete,
    Look,
    Mark,
    Put,
    Standing,
    Wait,
    _attempt_steps,
    commit_hash,
    commit_steps,
    retire_steps,
)
from tests.support.histories import DIED, Explorer, Rule, Steps, Wrong, as_it_is, rewritten, run_alone

SHARD = "a.tar-0123456789abcdef"
NAME = f"{SHARD}.parquet"
GAVE_UP = "gave up"
PUT_PART, PUT_ERRORS = Put("data", NAME), Put("errors", NAME)


@dataclass(frozen=True)
class Rows:
    """What a committer has read: the source's fingerprint, and whether samples failed, in which engines may differ."""

    source: str
    has_errors: bool


OLD, OLD_E, NEW, NEW_E = Rows("old", False), Rows("old", True), Rows("new", False), Rows("new", True)


@dataclass(frozen=True)
class File:
    version: str
    rows: Rows


@dataclass(frozen=True)
class Disk:
    """One shard's files, and its source as it is now."""

    source: str = "old"
    data: File | None = None
    errors: File | None = None
    marks: frozenset[str] = frozenset()

    def standing(self, kind: type[Standing] = Standing) -> Standing:
        marks = tuple(mark for name in sorted(self.marks) if (mark := Mark.parse(name)))
        return kind(marks, self.data and self.data.version, self.errors and self.errors.version)


@dataclass(frozen=True)
class Read:
    """One of the three requests that make a Look: for `marks`, `data` or `errors`."""

    what: str


def steps_of(rows: Rows) -> Steps:
    return commit_steps(SHARD, rows.source, rows.has_errors, attempts=1)


class ShardWorld:
    """A store whose versions are those of the content (an ETag) or unique for every write (a time)."""

    def __init__(
        self,
        rows: dict[str, Rows],
        unique: bool,
        make: Callable[[Rows], Steps] = steps_of,
        kind: type[Standing] = Standing,
    ) -> None:
        self.rows, self._unique, self._make, self._kind = rows, unique, make, kind
        self.accepted: set[Disk] = set()
        self.recovered: set[Disk] = set()

    def explorer(self) -> Explorer:
        return Explorer(self, {name: partial(self._make, rows) for name, rows in self.rows.items()})

    def perform(self, store: Disk, actor: str, step: Any, late: bool = False) -> tuple[Disk, Any]:  # noqa: PLR0911
        match step:
            case Look():
                return store, store.standing(self._kind)
            case Read(what):
                return store, getattr(store, what)
            case Check():
                return store, None if store.source == self._rows_of(actor).source else DIED
            case Confirm() | Wait():
                return store, None
            case Put("_ledger", name):
                return replace(store, marks=store.marks | {name}), "of no interest"
            case Put(folder, _):
                rows = self._rows_of(actor)
                version = f"{folder} {rows}" + (f" by {actor}{' late' * late}" if self._unique else "")
                return replace(store, **{folder: File(version, rows)}), version
            case Delete("_ledger", name):
                return replace(store, marks=store.marks - {name}), None
            case Delete(folder, _):
                return replace(store, **{folder: None}), None
        raise AssertionError(step)

    def _rows_of(self, actor: str) -> Rows:
        return self.rows.get(actor) or self._next_run

    def is_write(self, step: Any) -> bool:
        return isinstance(step, Put | Delete)

    def events(self, store: Disk) -> Iterable[Disk]:
        return [replace(store, source="new")] if store.source == "old" else []

    def check(self, before: Disk, after: Disk) -> None:
        if before.data is not None and after.data is None and "retirer" not in self.rows:
            raise Wrong("the part is missing for a moment")
        if after in self.recovered:
            return
        self.recovered.add(after)
        if self._is_accepted(after):
            self.accepted.add(after)
            return
        for has_errors in (False, True):
            self._next_run = Rows(after.source, has_errors)
            if not self._is_accepted(run_alone(self, after, "the next run", self._make(self._next_run))):
                raise Wrong(f"the next run does not make it right: {after}")

    def check_end(self, store: Disk) -> None:
        pass

    def _is_accepted(self, disk: Disk) -> bool:
        """Whether a plan believes that the present source is committed. If so, it must be, errors part included."""
        fingerprint = disk.standing(self._kind).fingerprint
        if fingerprint != disk.source:
            return False
        assert disk.data is not None
        wanted = disk.data.rows if disk.data.rows.has_errors else None
        if disk.data.rows.source != fingerprint or (disk.errors and disk.errors.rows) != wanted:
            raise Wrong(f"believed, but it is {disk}")
        return True


def committed(rows: Rows) -> Disk:
    data = File(f"data {rows}", rows)
    errors = File(f"errors {rows}", rows) if rows.has_errors else None
    mark = Mark(SHARD, rows.source, commit_hash(data.version, errors and errors.version))
    return Disk(data=data, errors=errors, marks=frozenset({mark.name}))


def leftovers() -> Disk:
    """What several deaths have left of a source of long ago."""
    ancient = Rows("ancient", True)
    marks = frozenset(Mark(SHARD, source, commit_hash("?", None)).name for source in ("ancient", "old"))
    return Disk(data=File("?", ancient), errors=File("!", ancient), marks=marks)


STARTS = {"empty": Disk(), "committed": committed(OLD), "with errors": committed(OLD_E), "leftovers": leftovers()}
PAIRS = list(combinations_with_replacement([OLD, OLD_E, NEW, NEW_E], 2))


def with_rule(rule: Rule) -> Callable[[Rows], Steps]:
    return lambda rows: rewritten(rule, steps_of(rows))


def torn_looks(step: Any, memory: set[Any]) -> Steps:
    """A Look as what it is: three requests, between which others write."""
    if not isinstance(step, Look):
        return (yield step)
    marks, data, errors = (yield Read("marks")), (yield Read("data")), (yield Read("errors"))
    return Disk(data=data, errors=errors, marks=marks).standing()


@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
@pytest.mark.parametrize(
    ("make", "may_lose", "at_least"),
    [(with_rule(torn_looks), False, 48_000_000), (steps_of, True, 364_000_000)],
    ids=["torn looks", "a late write"],
)
def test_every_history_of_two_committers(
    make: Callable[[Rows], Steps], may_lose: bool, at_least: int, unique: bool, capsys: pytest.CaptureFixture[str]
):
    histories = states = accepted = 0
    for (first, second), start in product(PAIRS, STARTS.values()):
        world = ShardWorld({"A": first, "B": second}, unique, make)
        explorer = world.explorer()
        histories += explorer.explore(start, may_lose)
        states += len(explorer.seen)
        accepted += len(world.accepted)
    with capsys.disabled():
        print(f" {histories:,} histories, {states:,} states, {accepted:,} stores accepted ", end="")
    assert histories >= at_least
    assert states >= 16_000
    assert accepted >= 60


class Settled(ShardWorld):
    """Where the source stays as it is, and both committers have said that they are done, the shard is."""

    def events(self, store: Disk) -> Iterable[Disk]:
        return []

    def perform(self, store: Disk, actor: str, step: Any, late: bool = False) -> tuple[Disk, Any]:
        return (replace(store, source=GAVE_UP), None) if step == GAVE_UP else super().perform(store, actor, step, late)

    def check(self, before: Disk, after: Disk) -> None:
        pass

    def check_end(self, store: Disk) -> None:
        if store.source != GAVE_UP and store.standing().fingerprint != "old":
            raise Wrong(f"both are done, but nothing is believed of {store}")


def or_given_up(steps: Steps) -> Steps:
    try:
        yield from steps
    except TransientError:
        yield GAVE_UP


@pytest.mark.parametrize("pair", [(OLD, OLD), (OLD, OLD_E)], ids=["the same rows", "other rows"])
def test_two_commits_that_both_say_so_leave_one_that_is_believed(pair: tuple[Rows, Rows]):
    rows = dict(zip("AB", pair, strict=True))

    def explore(make: Callable[[Rows], Steps]) -> None:
        Settled(rows, unique=True, make=make).explorer().explore(Disk())

    explore(lambda rows: or_given_up(commit_steps(SHARD, rows.source, rows.has_errors, attempts=2)))
    with pytest.raises(Wrong, match="both are done, but nothing is believed"):
        explore(lambda rows: _attempt_steps(SHARD, rows.source, rows.has_errors, (), None))


# --- Redos: a commit in the place of a valid one for the same source, as after `--retry-errors` ------------------------

PLANNED = committed(OLD_E)  # what stood when a redo was planned
(REPLACED,) = [mark.commit for mark in PLANNED.standing().marks]
REDOS = list(combinations_with_replacement([OLD, OLD_E], 2))
REDO_AND_COMMIT = list(product([OLD, OLD_E], [OLD, OLD_E, NEW, NEW_E]))


def redo_of(rows: Rows, rule: Rule = as_it_is) -> Steps:
    return rewritten(rule, commit_steps(SHARD, rows.source, rows.has_errors, replaces=REPLACED, attempts=1))


def redo_explorers(unique: bool, rule: Rule = as_it_is, kind: type[Standing] = Standing) -> Iterable[Explorer]:
    """Two redos of the same plan at once; a redo and a commit of another plan."""
    make = with_rule(rule)
    for pairs, second_is_redo in ((REDOS, True), (REDO_AND_COMMIT, False)):
        for first, second in pairs:
            other = partial(redo_of, second, rule) if second_is_redo else partial(make, second)
            actors = {"A": partial(redo_of, first, rule), "B": other}
            yield Explorer(ShardWorld({"A": first, "B": second}, unique, make, kind), actors)


@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
@pytest.mark.parametrize(
    ("rule", "starts", "may_lose", "at_least"),
    [(torn_looks, (PLANNED, leftovers()), False, 64_000_000), (as_it_is, (PLANNED,), True, 49_000_000)],
    ids=["torn looks", "a late write"],
)
def test_every_history_of_redos(rule: Rule, starts: tuple[Disk, ...], may_lose: bool, at_least: int, unique: bool):
    histories = 0
    for start in starts:
        for explorer in redo_explorers(unique, rule):
            histories += explorer.explore(start, may_lose)
    assert histories >= at_least


@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
def test_a_redo_replaces_the_commit_that_it_was_planned_for_and_no_other(unique: bool):
    world = ShardWorld({"first": OLD, "second": OLD, "other": NEW_E}, unique)
    redone = run_alone(world, PLANNED, "first", redo_of(OLD))
    assert redone.data.rows == OLD
    assert redone.errors is None
    assert [mark.fingerprint for mark in redone.standing().marks] == ["old"]
    assert redone.standing().valid_mark.commit != REPLACED
    assert run_alone(world, redone, "second", redo_of(OLD)) == redone, "a rival has redone it: nothing is written"
    newer = run_alone(world, replace(PLANNED, source="new"), "other", steps_of(NEW_E))
    assert newer.standing().fingerprint == "new"
    assert run_alone(world, newer, "first", redo_of(OLD)) == newer, "the source is another one by now"


@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
def test_every_history_of_a_commit_and_a_retirement(unique: bool):
    """A group that one run takes for vanished and another one has found again."""
    histories = 0
    for rows, start in product([OLD, OLD_E, NEW, NEW_E], STARTS.values()):
        world = ShardWorld({"A": rows, "retirer": rows}, unique)
        for shown in (None, start.standing()):
            actors = {"A": partial(steps_of, rows), "retirer": partial(retire_steps, SHARD, shown)}
            histories += Explorer(world, actors).explore(start, may_lose=shown is None)
        for disk in world.recovered:
            assert run_alone(world, disk, "retirer", retire_steps(SHARD)) == Disk(source=disk.source)
            shown = disk.standing()
            assert run_alone(world, disk, "retirer", retire_steps(SHARD, shown)) == Disk(source=disk.source)
            other = replace(shown, part="another")
            assert run_alone(world, disk, "retirer", retire_steps(SHARD, other)) == disk, "it is not what was shown"
    assert histories >= 500_000


# --- Planted violations: each order of the steps that is wrong must be found ----------------------------------------


class Trusting(Standing):
    """Believes a single mark, whatever the versions are that stand."""

    @property
    def valid_mark(self) -> Mark | None:
        return self.marks[0] if len(self.marks) == 1 and self.part is not None else None


def is_mark(step: Any) -> bool:
    return isinstance(step, Put) and step.folder == "_ledger"


def mark_before_part(step: Any, memory: set[Any]) -> Steps:
    if step == PUT_PART:
        return "not known yet"
    answer = yield step
    if is_mark(step):
        yield PUT_PART
    return answer


def old_marks_stay(step: Any, memory: set[Any]) -> Steps:
    if not (isinstance(step, Delete) and step.folder == "_ledger"):
        return (yield step)
    return None


def errors_part_after_the_mark(step: Any, memory: set[Any]) -> Steps:
    if step == PUT_ERRORS:
        memory.add(step)
        return None
    answer = yield step
    if is_mark(step) and PUT_ERRORS in memory:
        yield PUT_ERRORS
    return answer


def old_errors_part_stays(step: Any, memory: set[Any]) -> Steps:
    return None if step == Delete("errors", NAME) else (yield step)


def part_deleted_before_it_is_put(step: Any, memory: set[Any]) -> Steps:
    if step == PUT_PART:
        yield Delete("data", NAME)
    return (yield step)


def version_from_a_look_afterwards(step: Any, memory: set[Any]) -> Steps:
    answer = yield step
    return (yield Read("data")).version if step == PUT_PART else answer


@pytest.mark.parametrize(
    ("rule", "kind", "says"),
    [
        (as_it_is, Trusting, "believed, but"),  # a mark without the versions' hash
        (mark_before_part, Trusting, "believed, but"),
        (old_marks_stay, Standing, "the next run does not make it right"),
        (errors_part_after_the_mark, Trusting, "believed, but"),
        (old_errors_part_stays, Standing, "the next run does not make it right"),
        (part_deleted_before_it_is_put, Standing, "missing for a moment"),
        (version_from_a_look_afterwards, Standing, "believed, but"),
    ],
)
@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
@pytest.mark.parametrize("is_redo", [False, True], ids=["commits", "redos"])
def test_a_wrong_order_is_found(rule: Rule, kind: type[Standing], says: str, is_redo: bool, unique: bool):
    def explore_all() -> None:
        if is_redo:
            for explorer in redo_explorers(unique, rule, kind):
                explorer.explore(PLANNED)
            return
        for (first, second), start in product(PAIRS, STARTS.values()):
            ShardWorld({"A": first, "B": second}, unique, with_rule(rule), kind).explorer().explore(start)

    with pytest.raises(Wrong, match=says):
        explore_all()


@pytest.mark.parametrize(("rule", "is_safe"), [(as_it_is, True), (mark_before_part, False)])
def test_the_hash_is_for_two_committers_and_the_order_for_one(rule: Rule, is_safe: bool):
    """So the plants above are found for the reason that they are planted for."""
    world = ShardWorld({"A": NEW_E}, False, with_rule(rule), Trusting)
    if is_safe:
        world.explorer().explore(committed(OLD))
    else:
        with pytest.raises(Wrong):
            world.explorer().explore(committed(OLD))
