"""A device without hardware: what is enqueued is really done later, as early or late as a test says."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GARBAGE = 77  # what fresh memory holds


class FakeDevice:
    """See `transfer.Device`. After every call a queue goes on by itself with the probability of its eagerness; what it
    has not done by then is done when somebody waits for it. `deaf` names a kind of waiting that has no effect."""

    def __init__(self, copying: float, computing: float, seed: int = 0) -> None:
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.deaf = ""
        self._random = random.Random(seed)
        self.copying, self.computing = FakeQueue("copying", self), FakeQueue("computing", self)
        self._eagerness = {self.copying: copying, self.computing: computing}

    def on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), GARBAGE, dtype=dtype)

    on_device = on_host

    def go_on(self) -> None:
        for queue, eagerness in self._eagerness.items():
            while queue.pending and self._random.random() < eagerness:
                queue.step()


class FakeQueue:
    def __init__(self, name: str, device: FakeDevice) -> None:
        self.name, self.device = name, device
        self.pending: deque[Callable[[], object]] = deque()
        self.num_works = self.num_done = self.num_enqueued = 0

    def enqueue(self, work: Callable[[], object]) -> None:
        with self.device.lock:
            number = self.num_works
            self.num_works += 1
            self.device.log.append(f"enqueue {self.name} {number}")
            self._append(lambda: (self.device.log.append(f"do {self.name} {number}"), work()))

    def wait(self, event: FakeEvent) -> None:
        with self.device.lock:
            if self.device.deaf != "wait":
                self._append(event.reach)

    def record(self) -> FakeEvent:
        return FakeEvent(self, self.num_enqueued, self.num_works - 1)

    def _append(self, step: Callable[[], object]) -> None:
        self.pending.append(step)
        self.num_enqueued += 1
        self.device.go_on()

    def step(self) -> None:
        self.num_done += 1
        self.pending.popleft()()


@dataclass(frozen=True)
class FakeEvent:
    queue: FakeQueue
    place: int
    number: int

    def synchronize(self) -> None:
        device = self.queue.device
        with device.lock:
            device.log.append(f"wait for {self.queue.name} {self.number}")
            if device.deaf != "synchronize":
                self.reach()

    def reach(self) -> None:
        while self.queue.num_done < self.place:
            self.queue.step()
