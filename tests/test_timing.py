"""Time by stage, and time in which there is work."""

from __future__ import annotations

import pytest

from pipeline import timing
from pipeline.deaths import Guard, Notes
from pipeline.timing import Busy, Spent, Stopwatch


class Clock:
    """Time that passes when it is told to: in seconds, 0 at first."""

    def __init__(self) -> None:
        self.wall = self.cpu = self.others_cpu = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def thread_time(self) -> float:
        return self.cpu

    def process_time(self) -> float:
        return self.cpu + self.others_cpu

    def wait(self, seconds: float) -> None:
        self.wall += seconds

    def work(self, seconds: float) -> None:
        self.wall += seconds
        self.cpu += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_a_stopwatch_tells_waiting_from_work_and_stage_from_stage(clock: Clock) -> None:
    watch = Stopwatch()
    clock.wait(1)  # before any stage
    watch.switch("read")
    clock.wait(2)
    watch.switch("decode")
    clock.work(4)
    watch.switch(None)
    clock.work(8)
    assert watch.take() == Spent(read_s=2, read_cpu_s=0, decode_s=4, decode_cpu_s=4)
    assert watch.take() == Spent()


def test_what_other_threads_read_is_no_waiting(clock: Clock) -> None:
    watch = Stopwatch()
    watch.switch("read")
    clock.wait(3)
    clock.others_cpu += 2
    watch.switch("decode")
    clock.work(4)
    clock.others_cpu += 1  # perhaps Ray's
    watch.switch(None)
    spent = watch.take()
    assert (spent.read_cpu_s, spent.read_wait_s, spent.decode_cpu_s) == (2, 1, 4)


def test_two_calls_at_once_are_one_time_of_work(clock: Clock) -> None:
    busy = Busy()
    clock.wait(1)
    with busy.work():
        clock.work(2)
        with busy.work():
            clock.work(4)
        clock.wait(8)
    clock.wait(16)
    assert busy.take() == Spent(predict_s=14, predict_cpu_s=6)


def test_work_that_goes_on_is_counted_so_far(clock: Clock) -> None:
    busy = Busy()
    with busy.work():
        clock.wait(2)
        assert busy.take() == Spent(predict_s=2)
        clock.wait(3)
    assert busy.take() == Spent(predict_s=3)


def test_nothing_is_told_twice_a_second(clock: Clock) -> None:
    busy = Busy()
    with busy.work():
        clock.wait(0.9)
    assert busy.take() is None
    clock.wait(0.1)
    assert busy.take() == Spent(predict_s=0.9)


def test_a_guard_tells_what_the_blocks_took(clock: Clock) -> None:
    told: list[Spent] = []

    class Telling(Notes):
        def spend(self, spent: Spent) -> None:
            told.append(spent)

    guard = Guard(Telling(), "work")

    def blocks():
        for block in range(2):
            guard.check("read", 0, block)
            clock.wait(3)
            guard.check("decode", 0, block)
            clock.work(5)
            yield block

    for _ in guard.watch(blocks()):
        clock.wait(10)  # handing the block on is neither
    assert told == [Spent(read_s=6, decode_s=10, decode_cpu_s=10)]
