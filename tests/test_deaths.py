"""Which work kills: processes that die are blamed on their work, divided until one sample is left, and never wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deaths import LONE_DEATHS, SPLIT_AFTER, Deaths, Fate, Guard, Notes
from pipeline.errors import Reject


class Died(BaseException):
    """The process is gone: nothing of it may run after this."""


@dataclass
class Machine(Notes):
    """Processes that die one after the other, and the book that outlives them."""

    excuses: set[int] = field(default_factory=set)  # processes that die for a reason of their own
    process: int = 0
    dead: dict[str, Fate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.book = Deaths(lambda name: self.dead.get(name, Fate.ALIVE))

    def begin(self, work: str) -> int:
        return self.book.begin(work, str(self.process))

    def end(self, work: str) -> None:
        self.book.end(work, str(self.process))

    def die(self, fate: Fate = Fate.DEAD) -> None:
        self.dead[str(self.process)] = fate
        self.process += 1


def test_a_death_is_blamed_on_what_was_under_way_and_on_nothing_else() -> None:
    machine = Machine()
    assert machine.begin("done") == machine.begin("bad") == 0
    machine.end("done")
    machine.die()
    assert machine.begin("done") == 0
    assert machine.begin("bad") == 1
    machine.die()
    assert machine.begin("bad") == 2


@pytest.mark.parametrize("fate", [Fate.ALIVE, Fate.EXCUSED])
def test_nobody_is_blamed_by_those_who_live_or_died_of_something_else(fate: Fate) -> None:
    machine = Machine()
    machine.begin("work")
    machine.die(fate)
    assert machine.begin("work") == 0


def test_a_death_that_is_reported_late_still_counts() -> None:
    machine = Machine()
    machine.begin("work")
    machine.die(Fate.ALIVE)
    assert machine.begin("work") == 0
    machine.dead["0"] = Fate.DEAD
    machine.die()
    assert machine.begin("work") == 2


def test_the_book_forgets_what_went_well() -> None:
    machine = Machine()
    for number in range(100):
        machine.begin(str(number))
        machine.end(str(number))
    assert not machine.book._under_way
    assert not machine.book._deaths


# --- A process that makes blocks --------------------------------------------------------------------------------------

PER_BLOCK = 4


def blocks_of(samples: int, guard: Guard, do: Callable[[int], None]) -> Iterator[list[str]]:
    """Steps in blocks, as the readers make them."""

    def made() -> Iterator[list[str]]:
        block = []
        for index in range(samples):
            try:
                guard.check("decode", 0, index)
                do(index)
                block.append(str(index))
            except Reject as reject:
                block.append(reject.error)
            if len(block) == PER_BLOCK:
                yield block
                block = []
        if block:
            yield block

    return guard.watch(made())


def run_until_done(machine: Machine, samples: int, poisons: set[int], strikes: list[int]) -> list[str]:
    """What comes out in the end. `strikes`: how many steps each process lives that dies of something else."""
    for _ in range(1000):
        steps = iter(range(strikes.pop(0))) if strikes else None

        def do(index: int, steps: Iterator[int] | None = steps) -> None:
            if index in poisons:
                machine.die()
                raise Died
            if steps is not None and next(steps, None) is None:
                machine.die(Fate.EXCUSED)
                raise Died

        try:
            return [row for block in blocks_of(samples, Guard(machine, "shard"), do) for row in block]
        except Died:
            continue
    raise AssertionError("it never ends")


@settings(max_examples=200)
@given(st.integers(0, 17), st.sets(st.integers(0, 16), max_size=4), st.lists(st.integers(0, 20), max_size=8))
def test_only_the_samples_that_kill_are_left_out(samples: int, poisons: set[int], strikes: list[int]) -> None:
    machine = Machine()
    found = run_until_done(machine, samples, poisons, list(strikes))
    assert found == ["killed_worker" if index in poisons else str(index) for index in range(samples)]
    blamed = [fate for fate in machine.dead.values() if fate is Fate.DEAD]
    reached = len([p for p in poisons if p < samples])
    assert len(blamed) <= reached * (SPLIT_AFTER + LONE_DEATHS)


def test_a_sample_is_given_up_only_after_it_killed_alone() -> None:
    """Two deaths of a block and two of the sample are not enough."""
    machine = Machine()
    deaths = 0

    def do(index: int) -> None:
        nonlocal deaths
        if index == 1 and deaths < SPLIT_AFTER + LONE_DEATHS - 1:
            deaths += 1
            machine.die()
            raise Died

    for _ in range(deaths + 10):
        try:
            found = [row for block in blocks_of(3, Guard(machine, "shard"), do) for row in block]
            break
        except Died:
            continue
    assert found == ["0", "1", "2"]


def test_steps_are_noted_only_once_a_block_is_suspect() -> None:
    """A note costs a millisecond, and decoding an image two."""
    machine = Machine()
    noted: list[str] = []

    class Counting(Notes):
        def begin(self, work: str) -> int:
            noted.append(work)
            return machine.begin(work)

        def end(self, work: str) -> None:
            machine.end(work)

    list(blocks_of(9, Guard(Counting(), "shard"), lambda _: None))
    assert noted == [f"shard block {number}" for number in range(4)]
