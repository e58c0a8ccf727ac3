"""Small real datasets without Ray: the same steps as a run takes, one after the other in this process."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig, make_config
from pipeline.errors import redact
from pipeline.inputs.shards import current_fingerprint, discover
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.spec import make_spec, result_columns
from pipeline.model.zoo import resolve
from pipeline.outputs.commit import CommitContext, CommitTask, commit_shard
from pipeline.outputs.dataset import Dataset, make_identity
from pipeline.outputs.ledger import Mark, commit_hash
from pipeline.outputs.schema import Footer, write_parquet
from pipeline.planning import Plan, Task
from pipeline.rows import Kind
from pipeline.running import new_report
from pipeline.storage import Store
from pipeline.urls import with_absolute_urls


def commit_all(config: Mapping[str, Any] | JobConfig, run_id: str | None = None) -> Dataset:
    """Commit every shard of a job's input, and leave the report of that run."""
    job = with_absolute_urls(config if isinstance(config, JobConfig) else make_config(config))
    store = Store(job.input_storage)
    dataset = Dataset(job.output.url, Store(job.output_storage))
    spec = make_spec(job)
    info = resolve(spec)
    columns = result_columns(job.output, info)
    predictor = ResNetPredictor(spec, info, PredictorSettings("eager", "cpu", 16, columns))
    identity = make_identity(
        spec.identity, spec.fingerprint, list(info.classes) if info.classes is not None else None, info.num_classes
    )
    dataset.claim_identity(identity)
    report = new_report(job, spec, Plan([]))
    report.run_id = run_id or f"20260101T000000Z-{uuid.uuid4().hex[:8]}"
    for number, shard in enumerate(discover(job.input, store)):
        rows = list(read_rows(number, shard, job.input, store))
        pieces: list[pa.Table] = [predictor(b) for b in pixel_blocks(rows, spec.transform, job.input, 16)]
        end = next(row.index for row in rows if row.kind is Kind.END)
        last_path = Task(shard).last_path
        task = CommitTask(number, shard.url, shard.id, shard.fingerprint, end, tuple(pieces), last_path)
        committed = commit_shard(
            task, CommitContext(dataset, identity, columns, "eager"), lambda piece: piece,
            lambda shard=shard: current_fingerprint(shard, store),
        )  # fmt: skip
        report.shards_committed += 1
        report.predicted += committed.predicted
        report.errors += committed.errors
        report.committed.append(redact(shard.url))
    report.message = f"{report.shards_committed} shards committed"
    dataset.store.put(dataset.path("_runs", report.run_id, "report.json"), report.to_json().encode())
    return dataset


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table] = lambda rows: rows, **footer: Any) -> None:
    """Replace a part by other rows, or by ones that say something else of themselves."""
    table = pq.read_table(path)
    said = replace(Footer.of(table.schema), **footer)
    changed = change(table.replace_schema_metadata())
    write_parquet(path, changed.schema, [changed], said)


def vouch(dataset: Dataset, shard_id: str) -> None:
    """Make a mark that vouches for what stands there now and repeats its footer, as a commit would leave it."""
    standing = dataset.standing_of(shard_id)
    assert standing.part is not None
    for mark in standing.marks:
        Path(dataset.path("_ledger", mark.name)).unlink()
    footer = Footer.of(pq.read_schema(dataset.path("data", f"{shard_id}.parquet")))
    mark = Mark(shard_id, footer.shard_fingerprint, commit_hash(standing.part, standing.errors))
    Path(dataset.path("_ledger", mark.name)).write_text(json.dumps(footer.body()))


def names(dataset: Dataset) -> list[str]:
    return sorted(path.stem for path in Path(dataset.url, "data").iterdir())


def part(dataset: Dataset, number: int = 0, folder: str = "data") -> Path:
    return Path(dataset.url, folder, names(dataset)[number] + ".parquet")


def mark(dataset: Dataset, number: int = 0) -> Path:
    (path,) = Path(dataset.url, "_ledger").glob(f"{names(dataset)[number]}.*")
    return path


def set_column(name: str, place: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """One row's value in one column."""

    def change(rows: pa.Table) -> pa.Table:
        values = rows[name].to_pylist()
        values[place] = value
        column = pa.array(values, rows.schema.field(name).type)
        return rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)

    return change
