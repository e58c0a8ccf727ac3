"""All histories of two committers and one change of the source, with death after every step and one late write.

The steps are those that really run (`commit_steps`, `retire_steps`, `claim_steps`); the store is a small value. Wrong
orders of the same steps are planted too, and must be found by the same exploration.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement, product
from typing import Any

import pytest

from pipeline.errors import ModelMismatch
from pipeline.outputs.ledger import (
    Check,
    Claim,
    Confirm,
    Delete,
    Disown,
    Identify,
    Look,
    Mark,
    Owner,
    Put,
    Standing,
    claim_steps,
    commit_hash,
    commit_steps,
    retire_steps,
)
from tests.support.histories import DIED, Explorer, Wrong, run_alone

SHARD = "a.tar-0123456789abcdef"
NAME = f"{SHARD}.parquet"
PUT_PART, PUT_ERRORS = Put("data", NAME), Put("errors", NAME)

Steps = Generator[Any, Any, Any]
Rule = Callable[[Any, set[Any]], Steps]


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
    return commit_steps(SHARD, rows.source, rows.has_errors)


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
            case Confirm():
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


def rewritten(rule: Rule, steps: Steps) -> Steps:
    """The steps, each replaced by those that `rule` makes of it; its second argument is its memory."""
    memory, answer = set[Any](), None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield from rule(step, memory)


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


@pytest.mark.parametrize("unique", [False, True], ids=["etags", "times"])
def test_every_history_of_a_commit_and_a_retirement(unique: bool):
    """A group that one run takes for vanished and another one has found again."""
    histories = 0
    for rows, start in product([OLD, OLD_E, NEW, NEW_E], STARTS.values()):
        world = ShardWorld({"A": rows, "retirer": rows}, unique)
        actors = {"A": partial(steps_of, rows), "retirer": partial(retire_steps, SHARD)}
        histories += Explorer(world, actors).explore(start, may_lose=True)
        for disk in world.recovered:
            assert run_alone(world, disk, "retirer", retire_steps(SHARD)) == Disk(source=disk.source)
    assert histories >= 500_000


# --- Planted violations: each order of the steps that is wrong must be found ----------------------------------------


class Trusting(Standing):
    """Believes a single mark, whatever the versions are that stand."""

    @property
    def valid_mark(self) -> Mark | None:
        return self.marks[0] if len(self.marks) == 1 and self.part is not None else None


def as_it_is(step: Any, memory: set[Any]) -> Steps:
    return (yield step)


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
def test_a_wrong_order_is_found(rule: Rule, kind: type[Standing], says: str, unique: bool):
    def explore_all() -> None:
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


# --- Whose dataset it is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owned:
    """A dataset's claim, and its parts and marks by shard, each with the model that it is of."""

    claim: str | None = None
    data: frozenset[tuple[str, str]] = frozenset()
    marks: frozenset[tuple[str, str]] = frozenset()


REFUSED = ModelMismatch("claimed by another model")


class OwnershipWorld:
    """Runs that have a model and one shard each."""

    def __init__(self, runs: dict[str, tuple[str, str]], may_lose: bool) -> None:
        self._runs, self._may_lose = runs, may_lose
        self.owners: set[str] = set()
        self._recovered: set[Owned] = set()

    def perform(self, store: Owned, actor: str, step: Any, late: bool = False) -> tuple[Owned, Any]:  # noqa: PLR0911
        shard, model = self._runs[actor.removesuffix(" again")]
        match step:
            case Identify():
                return store, store.claim
            case Owner():
                return store, min((model for _, model in store.marks or store.data), default=None)
            case Claim(identity):
                return replace(store, claim=store.claim or identity), None
            case Disown():
                return replace(store, claim=None), None
            case Look():
                return store, Standing(part=dict(store.data).get(shard))
            case Check():
                return store, None if store.claim == model else DIED
            case Confirm():
                return store, None if store.claim == model else REFUSED
            case Put("data", _):
                return replace(store, data=frozenset((dict(store.data) | {shard: model}).items())), "a version"
            case Put("_ledger", _):
                return replace(store, marks=store.marks | {(shard, model)}), None
            case Delete("data", _):
                return replace(store, data=frozenset(part for part in store.data if part[0] != shard)), None
            case Delete("errors", _):
                return store, None
        raise AssertionError(step)

    def is_write(self, step: Any) -> bool:
        return isinstance(step, Put | Delete | Claim | Disown)

    def events(self, store: Owned) -> Iterable[Owned]:
        return ()

    def check(self, before: Owned, after: Owned) -> None:
        models = {model for _, model in after.marks}
        if len(models) > 1:
            raise Wrong(f"two models have committed: {after}")
        self.owners |= models
        if after not in self._recovered:
            self._recovered.add(after)
            for actor, (shard, model) in self._runs.items():
                self.check(after, run_alone(self, after, f"{actor} again", run_of(model, shard)))

    def check_end(self, store: Owned) -> None:
        # A part that lands after its writer has died or withdrawn it has no mark.
        if len({model for _, model in store.data}) > 1 and not self._may_lose:
            raise Wrong(f"parts of two models: {store}")


def run_of(model: str, shard: str, rule: Rule = as_it_is) -> Steps:
    if (yield from claim_steps(model, str)):
        yield from rewritten(rule, commit_steps(shard, "source", False))


def explore_runs(shards: str, claim: str | None, may_lose: bool, rule: Rule = as_it_is) -> tuple[int, set[str]]:
    """The number of histories of a run of model a and one of model b, and the models that can win."""
    runs = {"A": (shards[0], "a"), "B": (shards[1], "b")}
    world = OwnershipWorld(runs, may_lose)
    actors = {name: partial(run_of, model, shard, rule) for name, (shard, model) in runs.items()}
    return Explorer(world, actors).explore(Owned(claim), may_lose), world.owners


@pytest.mark.parametrize("may_lose", [False, True], ids=["", "a late write"])
@pytest.mark.parametrize("shards", ["ss", "st"], ids=["the same shard", "two shards"])
@pytest.mark.parametrize("claim", [None, "a", "of a third model"])
def test_every_history_of_two_models_in_an_empty_dataset(shards: str, claim: str | None, may_lose: bool):
    histories, winners = explore_runs(shards, claim, may_lose)
    assert histories >= 200_000
    assert winners == {"a", "b"}


def without_confirming(step: Any, memory: set[Any]) -> Steps:
    return None if isinstance(step, Confirm) else (yield step)


def test_a_commit_that_does_not_confirm_the_claim_is_found():
    with pytest.raises(Wrong, match="two models have committed"):
        explore_runs("st", "a", False, without_confirming)
