"""Pieces become a part, and the part appears: the I/O behind the decisions of `ledger.py`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PipelineError, SourceChanged
from pipeline.outputs.dataset import Dataset, Identity
from pipeline.outputs.ledger import Check, Delete, Look, Put, Receipt, Step, commit_steps, retire_steps
from pipeline.outputs.schema import ROWS_PER_GROUP, Footer, errors_schema, part_schema, write_parquet
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
    retires: tuple[str, ...] = ()


@dataclass(frozen=True)
class CommitContext:
    """What all commits of a run share."""

    dataset: Dataset
    identity: Identity
    columns: Columns
    engine: str


@dataclass(frozen=True)
class Committed:
    number: int
    predicted: int
    errors: int
    num_bytes: int


def describe(block: pa.Table, piece: Any) -> list[Receipt]:
    """What a block of pieces holds, shard by shard."""
    shards = block["shard"].to_numpy()
    kinds = block["kind"].to_numpy()
    indices = block["index"].to_numpy()
    receipts = []
    for shard in np.unique(shards):
        mine = shards == shard
        ends = indices[mine & (kinds == Kind.END)]
        abandoned = np.flatnonzero(mine & (kinds == Kind.ABANDONED))
        receipts.append(
            Receipt(
                shard=int(shard),
                indices=indices[mine & (kinds <= Kind.ERROR)],
                errors=int(np.count_nonzero(mine & (kinds == Kind.ERROR))),
                piece=piece,
                end=int(ends[0]) if len(ends) else None,
                abandoned=block["message"][int(abandoned[0])].as_py() if len(abandoned) else None,
            )
        )
    return receipts


def commit_shard(
    task: CommitTask, context: CommitContext, fetch: Fetch, source_fingerprint: Callable[[], str]
) -> Committed:
    """Merge a shard's pieces into one part and commit it, in the order that `ledger.py` gives.

    `source_fingerprint` looks up the source as it is now. Raises SourceChanged, ModelMismatch or a store's error;
    whatever stands then is done again by the next run.
    """
    with tempfile.TemporaryDirectory(prefix="resnet-batch-") as folder:
        merge = Merge(task, context.columns, fetch)
        footer = merge.footer(context)
        files = {"data": Path(folder, "part"), "errors": Path(folder, "errors")}
        write_parquet(files["data"], part_schema(context.columns), merge.parts(), footer)
        if merge.num_errors:
            write_parquet(files["errors"], errors_schema(), merge.errors(), footer)

        def perform(step: Step) -> Any:
            return _perform(step, task, context, files, footer, source_fingerprint)

        for gone in task.retires:
            run_steps(retire_steps(gone), perform)
        run_steps(commit_steps(task.shard_id, task.fingerprint, merge.num_errors > 0), perform)
        size = files["data"].stat().st_size
    return Committed(task.number, footer.predicted, footer.errors, size)


def retire_shard(dataset: Dataset, shard_id: str) -> None:
    """Take a shard out of the dataset."""

    def perform(step: Step) -> Any:
        if isinstance(step, Look):
            return dataset.standing_of(step.shard_id)
        assert isinstance(step, Delete)
        return dataset.store.delete(dataset.path(step.folder, step.name))

    run_steps(retire_steps(shard_id), perform)


def run_steps(steps: Any, perform: Callable[[Step], Any]) -> Any:
    """Perform each step and send its answer back; the steps' own return value."""
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = perform(step)


def _perform(
    step: Step,
    task: CommitTask,
    context: CommitContext,
    files: dict[str, Path],
    footer: Footer,
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
            return dataset.check_identity(context.identity)
        case Delete(folder, name):
            return dataset.store.delete(dataset.path(folder, name))
        case Put("_ledger", name):
            return dataset.store.put(dataset.path("_ledger", name), json.dumps(footer.body(), indent=1).encode())
        case Put(folder, name):
            return dataset.store.put(dataset.path(folder, name), files[folder])


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
            gathered.append(_select(self._fetch(self._task.pieces[number]).take(self._row[indices[mine]]), schema))
            place[mine] = np.arange(count, count + len(mine))
            count += len(mine)
        url = pa.repeat(pa.scalar(self._task.shard_url), len(indices))
        rows = pa.concat_tables(gathered).take(place)
        return rows.set_column(schema.get_field_index("shard"), schema.field("shard"), url)


def _select(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The output's columns of these rows; the shard's URL, the same for all, is put in afterwards."""
    names: Sequence[str] = [field.name for field in schema]
    strings = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.nulls(rows.num_rows, pa.string()))
    return strings.select(names).cast(schema)
