"""Which work kills the process that does it: noted outside of that process, and asked for before it is done again.

Ray does the work of a process that died again, without a limit and without saying why it died. So a process notes what
it is about to do again, and learns how many processes have died of that already. Work that was died of is done in ever
smaller pieces, down to a single sample, and a sample is given up only after it killed LONE_DEATHS processes while it
was all that they did. A process that died for a reason of its own (with its node, or of Ray's memory monitor) blames
nobody.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import Reject
from pipeline.timing import Spent, Stage, Stopwatch

SPLIT_AFTER = 1  # noted deaths before work is done in smaller pieces
LONE_DEATHS = 3  # deaths of one sample alone before it is given up

T = TypeVar("T")


class Fate(enum.Enum):
    """What has become of a process."""

    ALIVE = enum.auto()
    DEAD = enum.auto()
    EXCUSED = enum.auto()  # dead, but not of its work


class Notes:
    """Where a process notes its work, and the time that it took. `begin` answers how many have died of it so far.

    Nowhere, as they stand here: for work whose process dies alone, such as a notebook's.
    """

    def begin(self, work: str) -> int:
        return 0

    def end(self, work: str) -> None:
        pass

    def spend(self, spent: Spent) -> None:
        pass

    def die(self, reason: str) -> None:
        """End this process, if another one takes its place and does the work again."""


class Deaths:
    """The book that the notes are written into, as a pure function of what is noted and of the fates of processes.

    Holds what is under way and what has killed; not what went well.
    """

    def __init__(self, fate_of: Callable[[str], Fate]) -> None:
        self._fate_of = fate_of
        self._under_way: dict[str, set[str]] = {}  # work to the processes that have begun and not ended it
        self._deaths: Counter[str] = Counter()

    def begin(self, work: str, process: str) -> int:
        """Note that a process begins this work, which others may have begun before it and died of."""
        others = self._under_way.setdefault(work, set())
        for other in sorted(others - {process}):
            fate = self._fate_of(other)
            if fate is not Fate.ALIVE:
                others.discard(other)
                self._deaths[work] += fate is Fate.DEAD
        others.add(process)
        return self._deaths[work]

    def end(self, work: str, process: str) -> None:
        """Note that a process has done this work and lives."""
        others = self._under_way.get(work, set())
        others.discard(process)
        if not others:
            self._under_way.pop(work, None)


class Guard:
    """Watches over a process that makes one block after the other out of samples.

    It also takes the time of the steps. A block is noted as a whole. Once a process has died of one, every step of the
    work on it (reading or decoding one sample) is noted as well, so that the one that kills is found.
    """

    def __init__(self, notes: Notes | None = None, name: str = "") -> None:
        self._notes, self._name = notes or Notes(), name
        self._watch = Stopwatch()
        self._is_careful = False
        self._step: str | None = None

    def watch(self, blocks: Iterator[T]) -> Iterator[T]:
        """The same blocks. `name` and a block's number MUST mean the same work in every process."""
        number = 0
        while True:
            work = f"{self._name} block {number}"
            self._is_careful = self._notes.begin(work) >= SPLIT_AFTER
            block = next(blocks, None)
            self._watch.switch(None)
            self._end_step()
            self._notes.end(work)
            if block is None:
                self._notes.spend(self._watch.take())
                return
            yield block
            del block  # else it lives until the next one is made
            number += 1

    def check(self, stage: Stage, shard: int, index: int) -> None:
        """Called before a step. Raises Reject for one that is to be left out, since it kills."""
        self._watch.switch(stage)
        self._end_step()
        if not self._is_careful:
            return
        self._step = f"{stage} {shard}:{index}"
        if self._notes.begin(self._step) >= LONE_DEATHS:
            raise killer(stage)

    def _end_step(self) -> None:
        if self._step is not None:
            self._notes.end(self._step)
            self._step = None


def killer(stage: str) -> Reject:
    """What a sample is recorded with that killed whoever took it up."""
    return Reject(stage, "killed_worker", f"{LONE_DEATHS} processes died of it, while it was all that they did")
