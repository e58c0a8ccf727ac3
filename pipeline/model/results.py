"""What is kept of a network's outputs: the best classes and the embeddings as they are stored. On the host, by numpy.

`torch_engine.results_of` is the same for a device with memory of its own, where only results are copied back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from functools import partial
from threading import Event, Lock
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.model.engines import Engine, Outputs, PixelBatch
from pipeline.rows import Columns

CALLS = 2  # at once: one call's batches keep the device busy while the other's results become a table

# Row numbers (N,) within a block, and the pixels of these rows first; what is left of the B images is padding.
Batch = tuple[npt.NDArray[np.int64], PixelBatch]


class Results(NamedTuple):
    """Of N images. k is at most the number of classes; what is not wanted has the width 0."""

    scores: npt.NDArray[np.float32]  # (N, k) softmax, descending
    ids: npt.NDArray[np.int32]  # (N, k) class ids; ties in the order of the ids
    embeddings: npt.NDArray[np.floating]  # (N, D) in the stored type
    is_finite: npt.NDArray[np.bool_]  # (N,): all logits, and all of the embedding as it is stored


class Compute(Protocol):
    """Batches to the results of their rows, in any order. May take a batch up before it gives the last one out.

    Several threads may call it at once. Raises OutOfMemory where the device has too little: then what was not given
    out is not done.
    """

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[npt.NDArray[np.int64], Results]]: ...


class OnHost:
    """See `Compute`: an engine whose outputs lie in the host's memory. `threads`, as many as it has streams, do the
    batches of one call before those of the next: taking turns, two blocks would both be done as late as the second."""

    def __init__(self, engine: Engine, columns: Columns, threads: Executor) -> None:
        self._engine, self._columns, self._threads = engine, columns, threads
        self._queueing, self._drawing = Lock(), Lock()

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[npt.NDArray[np.int64], Results]]:
        left, is_over = iter(batches), Event()
        with self._queueing:
            shares = [self._threads.submit(self._outputs, left, is_over) for _ in range(self._engine.streams)]
        try:
            for share in shares:
                for rows, (logits, embeddings) in share.result():
                    yield rows, results_of(logits[: len(rows)], embeddings[: len(rows)], self._columns)
        finally:  # after a failure or a Ctrl-C, no stream goes on with what nobody waits for
            is_over.set()
            wait([share for share in shares if not share.cancel()])

    def _outputs(
        self, left: Iterator[Batch], is_over: Event
    ) -> list[tuple[npt.NDArray[np.int64], tuple[Outputs, Outputs]]]:
        """Of one stream: what it takes of the batches that are left."""
        done: list[tuple[npt.NDArray[np.int64], tuple[Outputs, Outputs]]] = []
        try:
            while not is_over.is_set():
                with self._drawing:
                    batch = next(left, None)
                if batch is None:
                    break
                logits, embeddings = self._engine(batch[1])
                if not len(logits) == len(embeddings) == len(batch[1]):
                    raise ValueError(f"the network made {len(logits)} rows of {len(batch[1])} images")
                done.append((batch[0], (logits, embeddings)))
        except BaseException:
            is_over.set()
            raise
        return done


def connect(engine: Engine, device: str, columns: Columns, thread: Executor) -> Compute:
    """The engine, which was loaded in `thread` on `device` (cpu or cuda), with what its outputs go through."""
    if device == "cpu":
        return OnHost(engine, columns, thread if engine.streams == 1 else ThreadPoolExecutor(engine.streams, "stream"))
    from pipeline.model.torch_engine import TorchEngine
    from pipeline.model.transfer import Cuda, OnDevice

    assert isinstance(engine, TorchEngine), "the other engines know CPUs only"
    return OnDevice(partial(engine.results, columns=columns), Cuda(), thread)


def results_of(logits: Outputs, embeddings: Outputs, columns: Columns) -> Results:
    """Logits float32 (N, C) and embeddings float32 (N, D) to what is stored of them."""
    is_finite = np.asarray(np.isfinite(logits).all(axis=1))
    scores, ids = logits[:, :0], np.empty((len(logits), 0), np.int32)
    if columns.top_k:
        scores = softmax(logits)
        ids = top_ids(scores, columns.top_k)
        scores = np.take_along_axis(scores, ids, axis=1)
    stored: npt.NDArray[np.floating] = embeddings[:, :0]
    if columns.embedding_dtype:
        with np.errstate(over="ignore"):  # what overflows to infinity becomes an error row
            stored = embeddings.astype(columns.embedding_dtype)
        is_finite = is_finite & np.isfinite(stored).all(axis=1)
    return Results(scores, ids, stored, is_finite)


def softmax(logits: Outputs) -> Outputs:
    """float32 (N, C) to float32 (N, C), rows summing to 1."""
    with np.errstate(invalid="ignore", over="ignore"):  # rows that are not finite become error rows
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def top_ids(scores: Outputs, k: int) -> npt.NDArray[np.int32]:
    """int32 (N, min(k, C)): the ids of the highest scores, descending, ties to the lower id."""
    num_classes = scores.shape[1]
    k = min(k, num_classes)
    if k == num_classes:
        return np.argsort(-scores, axis=1, kind="stable").astype(np.int32)
    # Sorting all classes costs more than a small network; but a tie across the cut must go to the lower id.
    ids = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    best = np.take_along_axis(scores, ids, axis=1)
    ids = np.take_along_axis(ids, np.argsort(-best, axis=1, kind="stable"), axis=1)
    is_tied = (scores >= best.min(axis=1, keepdims=True)).sum(axis=1) != k
    if is_tied.any():
        ids[is_tied] = np.argsort(-scores[is_tied], axis=1, kind="stable")[:, :k]
    return ids.astype(np.int32)
