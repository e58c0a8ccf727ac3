"""Time by stage, and time in which there is work."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import timing
from pipeline.deaths import Guard, NoNotes
from pipeline.timing import Busy, Spent, Stopwatch


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_stopwatch_tells_waiting_from_work_and_stage_from_stage() -> None:
    watch = Stopwatch()
    time.sleep(0.05)  # before any stage
    watch.switch("read")
    time.sleep(0.1)
    watch.switch("decode")
    burn(0.1)
    watch.switch(None)
    burn(0.05)
    spent = watch.take()
    assert 0.1 <= spent.read_s < spent.read_cpu_s + 0.3
    assert spent.read_cpu_s < 0.05
    assert 0.09 < spent.decode_cpu_s < 0.15
    assert spent.decode_s >= spent.decode_cpu_s - 0.01
    assert watch.take() == Spent()


def test_two_calls_at_once_are_one_time_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REPORT_EVERY_S", 0.0)
    busy = Busy()

    def work() -> None:
        with busy.work():
            time.sleep(0.2)

    begun = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = time.perf_counter() - begun
    time.sleep(0.1)
    spent = busy.take()
    assert spent is not None
    assert 0.2 <= spent.predict_s <= both


def test_work_that_goes_on_is_counted_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REPORT_EVERY_S", 0.0)
    busy = Busy()
    with busy.work():
        time.sleep(0.05)
        first = busy.take()
        time.sleep(0.05)
    second = busy.take()
    assert first is not None
    assert second is not None
    assert first.predict_s >= 0.05
    assert second.predict_s >= 0.05
    assert Busy().take() is not None


def test_nothing_is_told_twice_a_second() -> None:
    busy = Busy()
    with busy.work():
        time.sleep(0.01)
    assert busy.take() is None


def test_a_guard_tells_what_the_blocks_took() -> None:
    told: list[Spent] = []

    class Notes(NoNotes):
        def spend(self, spent: Spent) -> None:
            told.append(spent)

    guard = Guard(Notes(), "work")

    def blocks():
        for block in range(2):
            guard.check("read", 0, block)
            time.sleep(0.03)
            guard.check("decode", 0, block)
            burn(0.03)
            yield block

    for _ in guard.watch(blocks()):
        time.sleep(0.1)  # handing the block on is neither
    (spent,) = told
    assert 0.06 <= spent.read_s < 0.1
    assert 0.06 <= spent.decode_cpu_s < 0.1
