"""Pieces become a part, and the part appears: the I/O behind the decisions of `ledger.py`."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ModelMismatch, PipelineError, SourceChanged, translate
from pipeline.outputs.dataset import Dataset, Identity
from pipeline.outputs.ledger import (
    Check,
    Confirm,
    Delete,
    Look,
    Put,
    Standing,
    Step,
    Wait,
    commit_steps,
    retire_steps,
    run_steps,
)
from pipeline.outputs.progress import Receipt
from pipeline.outputs.schema import ROWS_PER_GROUP, Footer, errors_schema, part_schema, write_parquet
from pipeline.outputs.workspace import workspace
from pipeline.rows import Columns, Kind

Fetch = Callable[[Any], pa.Table]


@dataclass(frozen=True)
class CommitTask:
    """All that it takes to commit one shard. `number` is its place in the plan, by which rows name it."""

    number: int
    shard_url: str
    shard_id: str
    fingerprint: str
    num_rows: int
    pieces: tuple[Any, ...]
    last_path: str  # of a group of loose files, else empty
    retires: tuple[str, ...] = ()
    replaces: str | None = None  # the commit that a redo was planned to replace


@dataclass(frozen=True)
class CommitContext:
    """What all commits of a run share."""

    dataset: Dataset
    identity: Identity
    columns: Columns
    engine: str


@dataclass(frozen=True)
class Committed:
    predicted: int
    errors: int
    num_bytes: int
    is_ours: bool = True  # False: another run had committed the shard meanwhile, and nothing was written


def describe(block: pa.Table, piece: Any) -> list[Receipt]:
    """What a block of pieces holds, shard by shard. Ray may have merged blocks of several readings into it."""
    shards = block["shard"].to_numpy()
    kinds = block["kind"].to_numpy()
    indices = block["index"].to_numpy()
    receipts = []
    for shard in np.unique(shards):
        mine = shards == shard
        ends = np.unique(indices[mine & (kinds == Kind.END)])
        abandoned = np.flatnonzero(mine & (kinds == Kind.ABANDONED))
        receipt = Receipt(
            shard=int(shard),
            indices=indices[mine & (kinds <= Kind.ERROR)],
            errors=int(np.count_nonzero(mine & (kinds == Kind.ERROR))),
            piece=piece,
            end=int(ends[0]) if len(ends) else None,
            abandoned=block["message"][int(abandoned[0])].as_py() if len(abandoned) else None,
        )
        receipts.append(receipt)
        no_rows = np.empty(0, np.int64)
        receipts.extend(Receipt(receipt.shard, no_rows, 0, piece, end=int(other)) for other in ends[1:])
    return receipts


def commit_shard(
    task: CommitTask, context: CommitContext, fetch: Fetch, source_fingerprint: Callable[[], str]
) -> Committed:
    """Merge a shard's pieces into one part and commit it, in the order that `ledger.py` gives.

    `source_fingerprint` looks up the source as it is now. Raises SourceChanged, ModelMismatch or a store's error;
    whatever stands then is done again by the next run.
    """
    with workspace() as folder:
        merge = Merge(task, context.columns, fetch)
        footer = merge.footer(context)
        part, errors = folder / "part", folder / "errors"
        _write(part, part_schema(context.columns), merge.parts(), footer)
        if merge.num_errors:
            _write(errors, errors_schema(), merge.errors(), footer)
        mark = json.dumps(footer.body(), indent=1).encode()
        contents: dict[str, bytes | Path] = {"data": part, "errors": errors, "_ledger": mark}

        def perform(step: Step) -> Any:
            return _perform(step, task, context, contents, source_fingerprint)

        steps = commit_steps(task.shard_id, task.fingerprint, merge.num_errors > 0, task.retires, task.replaces)
        is_ours = run_steps(steps, perform)
        return Committed(footer.predicted, footer.errors, part.stat().st_size, is_ours)


def _write(path: Path, schema: pa.Schema, rows: Iterator[pa.Table], footer: Footer) -> None:
    try:
        write_parquet(path, schema, rows, footer)
    except OSError as cause:
        raise translate(cause, "write a temporary file below", tempfile.gettempdir()) from cause


def retire_shard(dataset: Dataset, shard_id: str, shown: Standing) -> bool:
    """Take a shard out of the dataset, unless something else stands than what was shown: then False."""

    def perform(step: Step) -> Any:
        match step:
            case Look(name):
                return dataset.standing_of(name)
            case Delete(folder, name):
                return dataset.store.delete(dataset.path(folder, name))
        raise AssertionError(step)

    return run_steps(retire_steps(shard_id, shown), perform)


def _perform(  # noqa: PLR0911 - a step each
    step: Step,
    task: CommitTask,
    context: CommitContext,
    contents: Mapping[str, bytes | Path],
    source_fingerprint: Callable[[], str],
) -> Any:
    dataset = context.dataset
    match step:
        case Look(shard_id):
            return dataset.standing_of(shard_id)
        case Check():
            found = source_fingerprint()
            if found != task.fingerprint:
                raise SourceChanged(f"{task.shard_url} changed since it was listed. The next run takes it anew.")
            return dataset.confirm_identity(context.identity)
        case Confirm():
            try:
                return dataset.confirm_identity(context.identity)
            except ModelMismatch as refusal:
                return refusal
        case Delete(folder, name):
            return dataset.store.delete(dataset.path(folder, name))
        case Put(folder, name):
            return dataset.store.put(dataset.path(folder, name), contents[folder])
        case Wait(seconds):
            return time.sleep(random.uniform(0, seconds))  # noqa: S311 - no secret


class Merge:
    """The rows of one shard, picked from pieces that may overlap, in index order and one row group at a time.

    Pieces are fetched when a row group needs them, so that memory does not grow with the shard. Raises PipelineError
    if an index below `num_rows` is missing.
    """

    def __init__(self, task: CommitTask, columns: Columns, fetch: Fetch) -> None:
        self._task, self._columns, self._fetch = task, columns, fetch
        self._piece = np.full(task.num_rows, -1, np.int64)
        self._row = np.zeros(task.num_rows, np.int64)
        is_error = np.zeros(task.num_rows, bool)
        for number, piece in enumerate(task.pieces):
            block = fetch(piece)
            kinds = block["kind"].to_numpy()
            rows = np.flatnonzero((block["shard"].to_numpy() == task.number) & (kinds <= Kind.ERROR))
            indices = block["index"].to_numpy()[rows]
            new = self._piece[indices] < 0  # the first piece that has an index gives its row
            self._piece[indices[new]], self._row[indices[new]] = number, rows[new]
            is_error[indices[new]] = kinds[rows[new]] == Kind.ERROR
        missing = np.flatnonzero(self._piece < 0)
        if len(missing):
            raise PipelineError(f"{task.shard_url}: no piece has index {missing[0]} ({len(missing)} missing)")
        self._predicted, self._errors = np.flatnonzero(~is_error), np.flatnonzero(is_error)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def footer(self, context: CommitContext) -> Footer:
        return Footer(
            shard=self._task.shard_url,
            shard_fingerprint=self._task.fingerprint,
            model_fingerprint=context.identity["model_fingerprint"],
            engine=context.engine,
            listed=self._task.num_rows,
            predicted=len(self._predicted),
            errors=len(self._errors),
            last_path=self._task.last_path,
        )

    def parts(self) -> Iterator[pa.Table]:
        """The rows of `data/`, a row group at a time."""
        return self._groups(self._predicted, part_schema(self._columns))

    def errors(self) -> Iterator[pa.Table]:
        """The rows of `errors/`, a row group at a time."""
        return self._groups(self._errors, errors_schema())

    def _groups(self, indices: np.ndarray, schema: pa.Schema) -> Iterator[pa.Table]:
        for start in range(0, len(indices), ROWS_PER_GROUP):
            yield self._group(indices[start : start + ROWS_PER_GROUP], schema)

    def _group(self, indices: np.ndarray, schema: pa.Schema) -> pa.Table:
        """The rows of these ascending indices, gathered from their pieces."""
        pieces = self._piece[indices]
        gathered: list[pa.Table] = []
        place = np.empty(len(indices), np.int64)  # where in `gathered` each index lies
        count = 0
        for number in np.unique(pieces):
            mine = np.flatnonzero(pieces == number)
            piece = _select(self._fetch(self._task.pieces[number]), schema)
            gathered.append(piece.take(self._row[indices[mine]]))
            place[mine] = np.arange(count, count + len(mine))
            count += len(mine)
        url = pa.repeat(pa.scalar(self._task.shard_url), len(indices))
        rows = pa.concat_tables(gathered).take(place)
        return rows.set_column(schema.get_field_index("shard"), schema.field("shard"), url)


def _select(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The output's columns of these rows; the shard's URL, the same for all, is put in afterwards."""
    strings = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.nulls(rows.num_rows, pa.string()))
    return strings.select(schema.names).cast(schema)
