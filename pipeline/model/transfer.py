"""Batches through a device with memory of its own. Imports torch; workers only.

The host fills pinned memory, one queue of the device copies it in, another computes and copies the results out, all at
the same time and one batch apart. What keeps them in order:

1. A batch MUST be computed after it was copied in: the computing queue waits for the copying one.
2. A slot's memory MUST NOT be used again before its last batch is finished: the host waits for that.
3. Results MUST be read after their batch is finished: the host waits, but not before the next batch is enqueued.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import cycle
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.model.engines import PixelBatch
from pipeline.model.results import CALLS, Batch, Results
from pipeline.model.torch_engine import memory_errors

SLOTS = 2  # batches under way per call: one is computed, the next is copied


class Event(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Have the host wait until the queue has come to this point."""


class Queue(Protocol):
    """Work that a device does in order, beside the host and beside other queues."""

    def enqueue(self, work: Callable[[], object]) -> None: ...
    def record(self) -> Event: ...
    def wait(self, event: Event) -> None:
        """Begin what is enqueued from now on after `event`."""


class Device(Protocol):
    """Two queues, and memory: that of the host is such that it can be copied from and to without waiting."""

    @property
    def copying(self) -> Queue: ...
    @property
    def computing(self) -> Queue: ...
    def on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...
    def on_device(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...


class CudaQueue:
    """See `Queue`: a CUDA stream."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def enqueue(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        # Blocking: the waiting thread sleeps, where it would else spin on a core that decoders need.
        event: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.record_event(event)  # type: ignore[arg-type]
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)


class Cuda:
    """See `Device`: the GPU that this process sees first."""

    def __init__(self) -> None:
        torch.cuda.synchronize()  # the network came on the default stream, which the others don't wait for
        self.copying, self.computing = CudaQueue(), CudaQueue()

    def on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def on_device(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")


class Slot:
    """The memory that one batch at a time passes through. Kept for the next batch of the same shape."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pixels_on_host = self._pixels = torch.empty(0, dtype=torch.uint8)
        self._results: list[Tensor] = []
        self._last: Event | None = None  # of what uses this memory

    def wait(self) -> None:
        """Until nothing uses this memory any more."""
        if self._last is not None:
            self._last.synchronize()

    def allocate(self, shape: Sequence[int]) -> None:
        if self._pixels.shape != tuple(shape):
            # Let go first, so that there is room; and of one shape, should the next line fail.
            self._pixels_on_host = self._pixels = torch.empty(0, dtype=torch.uint8)
            pixels = self._device.on_device(shape, torch.uint8)
            self._pixels_on_host, self._pixels = self._device.on_host(shape, torch.uint8), pixels

    def fill(self, pixels: PixelBatch) -> None:
        self._pixels_on_host.numpy()[:] = pixels

    def enqueue(self, compute: Callable[[Tensor], Sequence[Tensor]]) -> None:
        copying, computing = self._device.copying, self._device.computing
        copying.enqueue(partial(self._pixels.copy_, self._pixels_on_host, non_blocking=True))
        self._last = copying.record()
        computing.wait(self._last)
        try:
            computing.enqueue(lambda: self._store(compute(self._pixels)))
        finally:  # what was enqueued before a failure reads this memory too
            self._last = computing.record()

    def _store(self, results: Sequence[Tensor]) -> None:
        if [r.shape for r in self._results] != [r.shape for r in results]:
            self._results = [self._device.on_host(found.shape, found.dtype) for found in results]
        for kept, found in zip(self._results, results, strict=True):
            kept.copy_(found, non_blocking=True)

    def results(self, num_rows: int) -> Results:
        """Of the first rows, in memory of their own."""
        self.wait()
        return Results(*(kept[:num_rows].numpy().copy() for kept in self._results))


class OnDevice:
    """See `results.Compute`. `compute` takes uint8 pixels (B, H, W, 3) on the device and gives the fields of `Results`.

    The device is driven by `thread` alone, whoever calls: CUDA graphs belong to the thread that recorded them.
    """

    def __init__(self, compute: Callable[[Tensor], Sequence[Tensor]], device: Device, thread: Executor) -> None:
        self._compute, self._thread = compute, thread
        self._free: queue.LifoQueue[list[Slot]] = queue.LifoQueue()  # the last used have memory
        for _ in range(CALLS):
            self._free.put([Slot(device) for _ in range(SLOTS)])

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[npt.NDArray[np.int64], Results]]:
        slots = self._free.get()
        under_way: deque[tuple[npt.NDArray[np.int64], Slot]] = deque()
        try:
            with memory_errors():
                for (rows, pixels), slot in zip(batches, cycle(slots), strict=False):
                    self._put(pixels, slot)
                    under_way.append((rows, slot))
                    if len(under_way) == SLOTS:
                        yield _taken(under_way.popleft())
                while under_way:
                    yield _taken(under_way.popleft())
        finally:  # also if batches are still under way: a slot is waited for before it is used again
            self._free.put(slots)

    def _put(self, pixels: PixelBatch, slot: Slot) -> None:
        slot.wait()
        self._thread.submit(slot.allocate, pixels.shape).result()
        slot.fill(pixels)
        self._thread.submit(slot.enqueue, self._compute).result()


def _taken(batch: tuple[npt.NDArray[np.int64], Slot]) -> tuple[npt.NDArray[np.int64], Results]:
    rows, slot = batch
    return rows, slot.results(len(rows))
