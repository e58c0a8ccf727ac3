"""What the time of a run went into: measured where the work is done, summed up by the run's witness."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

Stage = Literal["read", "decode"]

REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Spent:
    """Seconds of all processes together. `_cpu_s` is what of it a core worked; the rest is waiting."""

    read_s: float = 0.0
    read_cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    predict_s: float = 0.0  # in which an actor had work, whether for one block or for two at once
    predict_cpu_s: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def read_wait_s(self) -> float:
        """Seconds that reading waited for the store. Where there is more to do than cores, everything waits for a core:
        that is left out, by the measure of decoding, which waits for nothing else."""
        for_a_core = self.decode_s / self.decode_cpu_s if self.decode_cpu_s else 1.0
        return max(self.read_s - self.read_cpu_s * for_a_core, 0.0)


class Stopwatch:
    """Time by stage, of a thread that does one stage after the other. While it reads, what other threads of the process
    work is reading, too: remote stores are read by threads of fsspec's and ours."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._wall, self._cpu, self._all_cpu = time.perf_counter(), time.thread_time(), time.process_time()
        self._spent: dict[str, float] = {}

    def switch(self, stage: Stage | None) -> None:
        """The stage that begins now; None for what is not ours."""
        wall, cpu, all_cpu = time.perf_counter(), time.thread_time(), time.process_time()
        if self._stage is not None:
            worked = all_cpu - self._all_cpu if self._stage == "read" else cpu - self._cpu
            for name, seconds in ((f"{self._stage}_s", wall - self._wall), (f"{self._stage}_cpu_s", worked)):
                self._spent[name] = self._spent.get(name, 0.0) + seconds
        self._stage, self._wall, self._cpu, self._all_cpu = stage, wall, cpu, all_cpu

    def take(self) -> Spent:
        """What was spent since the last time that this was asked."""
        spent, self._spent = Spent(**self._spent), {}
        return spent


class Busy:
    """The time in which a process has work, be it one call or several at once, and what its cores do meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._wall = 0.0
        self._since = time.perf_counter()
        self._taken_at, self._cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def work(self) -> Iterator[None]:
        self._step(+1)
        try:
            yield
        finally:
            self._step(-1)

    def _step(self, calls: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self._wall += now - self._since if self._calls else 0.0
            self._since = now
            self._calls += calls

    def take(self) -> Spent | None:
        """What was spent since the last time that this gave something; None where that was just now."""
        self._step(0)
        with self._lock:
            if self._since - self._taken_at < REPORT_EVERY_S:
                return None
            cpu = time.process_time()
            spent = Spent(predict_s=self._wall, predict_cpu_s=cpu - self._cpu)
            self._taken_at, self._wall, self._cpu = self._since, 0.0, cpu
            return spent
