"""What each kind of process of a run holds and takes, sampled while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import psutil

from benchmarks.measuring import pss_mb

EVERY_S = 0.5
RAY = "Ray's servers"
KINDS = {"Committer": "committer", "MapWorker": "actor", "Predictor": "actor"}  # what a process title says


@dataclass
class Sample:
    seconds: float
    cpu: float  # seconds, of all processes so far
    held: dict[str, float]  # MB, of the largest process of each kind


@dataclass
class Tree:
    """A driver and all processes below it."""

    samples: list[Sample] = field(default_factory=list)
    _cpu: dict[int, float] = field(default_factory=dict)
    _kinds: dict[int, str] = field(default_factory=dict)

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(psutil.Process(pid), ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @property
    def peaks(self) -> dict[str, float]:
        return _peaks(self.samples)

    @property
    def cpu(self) -> float:
        return self.samples[-1].cpu

    def over_time(self, pieces: int) -> list[dict[str, float]]:
        """The peaks in each of so many pieces of the time in which work was done."""
        working = [sample for sample in self.samples if "worker" in sample.held]
        bounds = [len(working) * piece // pieces for piece in range(pieces + 1)]
        return [_peaks(working[a:b]) for a, b in pairwise(bounds)]

    def _watch(self, root: psutil.Process, ended: threading.Event) -> None:
        start = time.monotonic()
        while not ended.wait(EVERY_S):
            held: dict[str, float] = {}
            with suppress(psutil.NoSuchProcess):
                for process in (root, *root.children(recursive=True)):
                    with suppress(psutil.Error, OSError):
                        self._look(process, process.pid == root.pid, held)
            if not held:
                return
            self.samples.append(Sample(time.monotonic() - start, sum(self._cpu.values()), held))

    def _look(self, process: psutil.Process, is_root: bool, held: dict[str, float]) -> None:
        title = " ".join(process.cmdline())
        kind = "driver" if is_root else self._kinds.get(process.pid) or _kind(title)
        if kind != RAY:  # a worker is idle at first, and an actor's title comes later
            self._kinds[process.pid] = kind
        times = process.cpu_times()
        self._cpu[process.pid] = times.user + times.system
        held[kind] = max(held.get(kind, 0), pss_mb(process.pid, with_shared=False))


def _kind(title: str) -> str:
    if "ray::" not in title or "IDLE" in title:
        return RAY
    return next((kind for text, kind in KINDS.items() if text in title), "worker")


def _peaks(samples: list[Sample]) -> dict[str, float]:
    kinds = {kind for sample in samples for kind in sample.held}
    return {kind: max(sample.held.get(kind, 0) for sample in samples) for kind in kinds}
