"""Batches through a device whose queues work when it pleases them: the numbers are right only if all waits are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model.engines import OutOfMemory
from pipeline.model.results import Batch, Results, results_of
from pipeline.model.torch_engine import TorchEngine
from pipeline.model.torch_engine import results_of as results_on_device
from pipeline.model.transfer import CALLS, OnDevice
from pipeline.rows import Columns
from tests.model.fake_device import FakeDevice

BATCH = 4
SCHEDULES = [*itertools.product((0, 1), repeat=2), (0.5, 0.5)]  # how eager the queues are: copying, computing


def colours(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A network whose results tell which image a row is of."""
    value = pixels[:, 0, 0, 0].to(torch.float32)
    return torch.stack([value, -value, 0 * value], dim=1), torch.stack([value, value + 1], dim=1)


def line(device: FakeDevice, network: Callable[[Tensor], tuple[Tensor, Tensor]] = colours) -> OnDevice:
    engine = TorchEngine(network, torch.device("cpu"), None)
    return OnDevice(lambda pixels: engine.results(pixels, Columns(2, "float32", 0)), device, ThreadPoolExecutor(1))


def batches_of(numbers: Sequence[int], side: int = 2, device: FakeDevice | None = None) -> Iterator[Batch]:
    """Batches whose images are of the colour of their row number, and the last of each batch is padding."""
    for number in numbers:
        rows = np.arange(number * (BATCH - 1), (number + 1) * (BATCH - 1))
        pixels = np.zeros((BATCH, side, side, 3), np.uint8)
        pixels[:-1] = rows.reshape(-1, 1, 1, 1)
        if device is not None:
            device.log.append(f"take up {number}")
        yield rows, pixels


def embeddings(found: Sequence[tuple[np.ndarray, Results]]) -> dict[int, float]:
    return {int(row): float(value) for rows, r in found for row, value in zip(rows, r.embeddings[:, 0], strict=True)}


def expected(numbers: Sequence[int]) -> dict[int, float]:
    return {row: float(row) for rows, _ in batches_of(numbers) for row in rows}


@pytest.mark.parametrize("eagerness", SCHEDULES)
@pytest.mark.parametrize("num_batches", [0, 1, 2, 7])
def test_whenever_the_device_works_the_numbers_are_right(num_batches: int, eagerness: tuple[float, float]) -> None:
    for seed in range(5):
        run = line(FakeDevice(*eagerness, seed=seed))
        for side in (2, 2, 3):
            assert embeddings(list(run(batches_of(range(num_batches), side)))) == expected(range(num_batches))


@pytest.mark.parametrize("deaf", ["wait", "synchronize"])
def test_without_a_wait_the_numbers_are_wrong(deaf: str) -> None:
    """Else the test above would show nothing."""
    is_right = []
    for eagerness in SCHEDULES:
        device = FakeDevice(*eagerness)
        run = line(device)
        list(run(batches_of(range(7, 14))))
        device.deaf = deaf
        is_right.append(embeddings(list(run(batches_of(range(7))))) == expected(range(7)))
    assert not all(is_right)


def test_the_order_of_events() -> None:
    """The next batch is on its way before the results of this one are waited for, and what is under way is bounded."""
    device = FakeDevice(0, 0)
    for number, _ in enumerate(line(device)(batches_of(range(4), device=device))):
        device.log.append(f"give out {number}")
    assert device.log == [
        *("take up 0", "enqueue copying 0", "enqueue computing 0"),
        *("take up 1", "enqueue copying 1", "enqueue computing 1"),
        *("wait for computing 0", "do copying 0", "do computing 0", "give out 0"),
        *("take up 2", "wait for computing 0", "enqueue copying 2", "enqueue computing 2"),
        *("wait for computing 1", "do copying 1", "do computing 1", "give out 1"),
        *("take up 3", "wait for computing 1", "enqueue copying 3", "enqueue computing 3"),
        *("wait for computing 2", "do copying 2", "do computing 2", "give out 2"),
        *("wait for computing 3", "do copying 3", "do computing 3", "give out 3"),
    ]


@pytest.mark.parametrize("eagerness", SCHEDULES)
def test_calls_at_once_share_the_device_and_nothing_else(eagerness: tuple[float, float]) -> None:
    run = line(FakeDevice(*eagerness))
    shares = [range(number, 24, 4) for number in range(2 * CALLS)]
    with ThreadPoolExecutor(len(shares)) as threads:
        found = list(threads.map(lambda numbers: embeddings(list(run(batches_of(numbers)))), shares))
    assert found == [expected(numbers) for numbers in shares]


def test_what_is_left_alone_halfway_leaves_the_device_to_others() -> None:
    run = line(FakeDevice(0, 0))
    for _ in range(2 * CALLS):
        next(iter(run(batches_of(range(7)))))
    assert embeddings(list(run(batches_of(range(3))))) == expected(range(3))


def test_too_little_memory_is_said_in_the_engines_words() -> None:
    def network(pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = line(FakeDevice(0, 1), network)
    for _ in range(2 * CALLS):
        with pytest.raises(OutOfMemory, match=r"2\.00 GiB"):
            list(run(batches_of([0])))


@pytest.mark.parametrize(
    "columns", [Columns(5, "float16", 0), Columns(100, "float32", 0), Columns(0, "float16", 0), Columns(3, None, 0)]
)
def test_the_device_keeps_what_the_host_keeps(columns: Columns) -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (64, 40)).astype(np.float32)  # full of ties
    vectors = rng.normal(0, 1, (64, 16)).astype(np.float32)
    logits[3, 5], logits[4, 6], vectors[5, 7], vectors[6, 8] = np.nan, np.inf, -np.inf, 1e5
    on_host = results_of(logits, vectors, columns)
    on_device = Results(*(t.numpy() for t in results_on_device(torch.tensor(logits), torch.tensor(vectors), columns)))
    assert [a.dtype for a in on_device] == [a.dtype for a in on_host]
    assert [a.shape for a in on_device] == [a.shape for a in on_host]
    lost = {3, 4, *({5} if columns.embedding_dtype else {}), *({6} if columns.embedding_dtype == "float16" else {})}
    assert set(np.flatnonzero(~on_host.is_finite)) == set(np.flatnonzero(~on_device.is_finite)) == lost
    kept = on_host.is_finite
    np.testing.assert_array_equal(on_device.ids[kept], on_host.ids[kept])
    np.testing.assert_array_equal(on_device.embeddings, on_host.embeddings)
    np.testing.assert_allclose(on_device.scores[kept], on_host.scores[kept], rtol=1e-6)
