"""Pieces as they leave the predictor, with values that follow from the index, and commits of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.outputs.commit import CommitContext, CommitTask, Committed, commit_shard
from pipeline.outputs.dataset import Dataset, Identity, make_identity
from pipeline.rows import Columns, Kind
from pipeline.storage import Store

BOTH = Columns(top_k=2, embedding_dtype="float16", embedding_dim=4)
LABELS = Columns(top_k=2, embedding_dtype=None, embedding_dim=4)
VECTORS = Columns(top_k=0, embedding_dtype="float32", embedding_dim=4)
IDENTITY = make_identity({"name": "resnet18", "weights": "IMAGENET1K_V1"}, "0123456789abcdef", ["cat", "dog"], 2)


def piece(
    columns: Columns, shard: int, indices: Sequence[int] | np.ndarray, errors: Collection[int] = (), salt: int = 0
) -> pa.Table:
    """Rows of one shard; those whose index is in `errors` are error rows. Another `salt` is another content."""
    index = np.asarray(indices, np.int64)
    failed = np.isin(index, np.fromiter(errors, np.int64, len(errors)))
    values: dict[str, Any] = {
        "shard": pa.array(np.full(len(index), shard, np.int32)),
        "kind": pa.array(np.where(failed, Kind.ERROR, Kind.SAMPLE).astype(np.uint8)),
        "index": pa.array(index),
        "key": pa.array([f"{salt}/{shard}/{i}" for i in index.tolist()]),
        "stage": _where(failed, "decode"),
        "error": _where(failed, "corrupt"),
        "message": _where(failed, "broken beyond repair"),
        "bytes_sha256": _where(failed, "ab" * 32),
        "num_bytes": pa.array(np.full(len(index), 7), mask=~failed),
        "width": pa.array(np.full(len(index), 640, np.int32), mask=failed),
        "height": pa.array(np.full(len(index), 480, np.int32), mask=failed),
    }
    if columns.top_k:
        values |= _predictions(index + salt, failed)
    if columns.embedding_dtype:
        values["embedding"] = _embedding(index + salt, failed, columns)
    return pa.table(values).cast(columns.pieces())


def marker(columns: Columns, shard: int, kind: Kind, index: int = 0, message: str | None = None) -> pa.Table:
    """The row that ends a shard."""
    row = {"shard": shard, "kind": int(kind), "index": index, "message": message}
    return pa.Table.from_pylist([row], schema=columns.pieces())


def _where(chosen: np.ndarray, text: str) -> pa.Array:
    return pa.array([text if yes else None for yes in chosen.tolist()], pa.string())


def _predictions(value: np.ndarray, failed: np.ndarray) -> dict[str, pa.Array]:
    labels = [None if bad else ("cat", "dog")[v % 2] for v, bad in zip(value.tolist(), failed, strict=True)]
    second = {"class_id": 1, "label": "dog", "score": 0.25}
    top = [label and [{"class_id": 0, "label": label, "score": 0.5}, second] for label in labels]
    return {
        "class_id": pa.array((value % 2).astype(np.int32), mask=failed),
        "label": pa.array(labels, pa.string()),
        "score": pa.array((1 - value % 100 / 100).astype(np.float32), mask=failed),
        "top_k": pa.array(top, BOTH.results()[3].type),
    }


def embeddings(value: np.ndarray, columns: Columns) -> np.ndarray:
    """(N, D) in the dataset's dtype: exact in float16."""
    grid = value[:, None] * 31 + np.arange(columns.embedding_dim)
    return (grid % 1009 / 8).astype(columns.embedding_dtype)


def _embedding(value: np.ndarray, failed: np.ndarray, columns: Columns) -> pa.Array:
    flat = pa.array(embeddings(value, columns).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, columns.embedding_dim, mask=pa.array(failed))


def new_dataset(folder: Path, identity: Identity = IDENTITY, store: Store | None = None) -> Dataset:
    """A dataset that is claimed for the model of `identity`."""
    dataset = Dataset(str(folder), store or Store())
    dataset.claim_identity(identity)
    return dataset


def commit(
    dataset: Dataset,
    pieces: Sequence[pa.Table],
    num_rows: int,
    columns: Columns = BOTH,
    *,
    number: int = 0,
    fingerprint: str = "1" * 16,
    current: Callable[[], str] | None = None,
    retires: tuple[str, ...] = (),
    replaces: str | None = None,
    identity: Identity = IDENTITY,
) -> Committed:
    """Commit shard `number`, `/in/<number>.tar`, from tables; `current` looks up the source's fingerprint."""
    places = tuple(range(len(pieces)))
    url = f"file:///in/{number}.tar"
    task = CommitTask(number, url, shard_id(number), fingerprint, num_rows, places, "", retires, replaces)
    context = CommitContext(dataset, identity, columns, "eager")
    return commit_shard(task, context, pieces.__getitem__, current or (lambda: fingerprint))


def shard_id(number: int) -> str:
    return f"{number}.tar-{number:016x}"
