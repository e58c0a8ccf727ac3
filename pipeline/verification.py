"""A whole dataset checked from the outside: marks, parts, errors parts, footers and rows against each other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig, make_config
from pipeline.errors import ConfigError, NotFound
from pipeline.inputs.shards import discover
from pipeline.local import predict_rows
from pipeline.outputs.dataset import PARQUET, Dataset, Identity, read_table
from pipeline.outputs.ledger import Standing
from pipeline.outputs.schema import Footer, errors_schema, part_schema
from pipeline.rows import Columns
from pipeline.storage import Store

SAMPLE_MIN_COSINE = 0.99  # of the centred embeddings of another engine or processor


@dataclass
class Verification:
    """What was checked, and each thing that is wrong by name."""

    url: str
    shards: int = 0
    predicted: int = 0
    errors: int = 0
    sampled: int = 0
    agreed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        text = f"{self.shards} shards, {self.predicted:,} rows, {self.errors:,} error rows"
        if self.sampled:
            text += f"; {self.agreed} of {self.sampled} recomputed rows agree"
        return "\n".join([f"{text}: {'all is well' if self.ok else f'{len(self.problems)} problems'}", *self.problems])


def verify_dataset(url: str, store: Store, sample: int = 0, config: JobConfig | None = None) -> Verification:
    """Read every part of the dataset and name every offender.

    With `sample`, so many rows are recomputed from their source bytes, with the given config or that of the last run.
    """
    dataset = Dataset(url, store)
    identity = dataset.identity()
    if identity is None:
        raise NotFound(f"there is no dataset at {url}: it has no _dataset.json.")
    result = Verification(url)
    urls: dict[str, str] = {}
    standing = sorted(dataset.standing().items())
    with ThreadPoolExecutor(8) as pool:
        checked = pool.map(lambda item: _check_shard(dataset, identity, *item), standing)
        for (name, _), (footer, problems) in zip(standing, checked, strict=True):
            result.problems.extend(f"{name}: {problem}" for problem in problems)
            if footer is None:
                continue
            result.shards += 1
            result.predicted += footer.predicted
            result.errors += footer.errors
            if urls.setdefault(footer.shard, name) != name:
                result.problems.append(f"{name}: {footer.shard} stands twice, also as {urls[footer.shard]}")
    if sample and result.ok:
        _recompute(dataset, sample, config or _last_config(dataset), result)
    return result


def _check_shard(
    dataset: Dataset, identity: Identity, shard_id: str, standing: Standing
) -> tuple[Footer | None, list[str]]:
    mark = standing.valid_mark
    if mark is None:
        marks = f"{len(standing.marks)} marks" if len(standing.marks) != 1 else "a mark for other versions"
        there = [name for name in ("part", "errors") if getattr(standing, name) is not None]
        return None, [f"not committed: {marks}, and there is {' and '.join(there) or 'no part'}. A run does it again."]
    body = dataset.read_mark(mark)
    rows, footer = _read(dataset, f"data/{shard_id}{PARQUET}")
    has_errors = standing.errors is not None
    errors = _read(dataset, f"errors/{shard_id}{PARQUET}")[0] if has_errors else errors_schema().empty_table()
    problems = list(_problems(rows, errors, footer, identity))
    if footer.body() != body:
        problems.append(f"its mark says {body}, its footer {footer.body()}")
    if footer.shard_fingerprint != mark.fingerprint:
        problems.append(f"its mark is for source {mark.fingerprint}, its footer for {footer.shard_fingerprint}")
    return footer, problems


def _read(dataset: Dataset, name: str) -> tuple[pa.Table, Footer]:
    with dataset.store.open(dataset.path(name), read_ahead=False) as file:
        table = pq.read_table(file)
    return table.replace_schema_metadata(), Footer.of(table.schema)


def _problems(rows: pa.Table, errors: pa.Table, footer: Footer, identity: Identity) -> Iterator[str]:
    if footer.model_fingerprint != identity["model_fingerprint"]:
        yield f"model {footer.model_fingerprint}, but the dataset is {identity['model_fingerprint']}"
    if rows.num_rows != footer.predicted or errors.num_rows != footer.errors:
        yield f"{rows.num_rows} rows and {errors.num_rows} error rows, its footer says {footer}"
    indices = np.sort(np.concatenate([rows["index"].to_numpy(), errors["index"].to_numpy()]))
    if not np.array_equal(indices, np.arange(footer.listed)):
        yield f"its indices are not 0..{footer.listed - 1}, each once"
    for table in (rows, errors):
        if table.num_rows and set(table["shard"].unique().to_pylist()) != {footer.shard}:
            yield f"rows of other shards than {footer.shard}"
    yield from _schema_problems(rows.schema, errors.schema)
    if "embedding" in rows.column_names and rows.num_rows:
        values = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if not np.isfinite(values).all():
            yield "embeddings that are not finite"


def _schema_problems(rows: pa.Schema, errors: pa.Schema) -> Iterator[str]:
    embedding = rows.field("embedding").type if "embedding" in rows.names else None
    if embedding is not None and not pa.types.is_fixed_size_list(embedding):
        yield f"embedding is {embedding}, not a list of fixed size"
        return
    dtype: Any = "float16" if embedding is not None and embedding.value_type == pa.float16() else "float32"
    dim = embedding.list_size if embedding is not None else 0
    expected = part_schema(Columns("class_id" in rows.names, embedding is not None, dtype, dim))
    if not rows.equals(expected):
        yield f"schema {rows.to_string()} is not {expected.to_string()}"
    if not errors.equals(errors_schema()):
        yield f"errors schema {errors.to_string()} is not {errors_schema().to_string()}"


def _last_config(dataset: Dataset) -> JobConfig:
    reports = sorted(f.url for f in dataset.store.find(dataset.path("_runs")) if f.url.endswith("/report.json"))
    if not reports:
        raise ConfigError("--sample recomputes rows, and no report tells how they were made. Give --config.")
    return make_config(json.loads(dataset.store.read(reports[-1]))["config"])


def _recompute(dataset: Dataset, sample: int, config: JobConfig, result: Verification) -> None:
    """Recompute random rows and compare class and embedding."""
    rows = read_table(dataset, "data")
    if not rows.num_rows:
        return
    chosen = sorted(random.sample(range(rows.num_rows), min(sample, rows.num_rows)))
    stored = rows.take(chosen)
    shards = {shard.url: shard for shard in discover(config.input, Store(config.input_storage))}
    wanted: dict[str, set[int]] = {}
    for url, index in zip(stored["shard"].to_pylist(), stored["index"].to_pylist(), strict=True):
        wanted.setdefault(url, set()).add(index)
    gone = wanted.keys() - shards.keys()
    result.problems.extend(f"{url}: gone from the input, its rows can't be recomputed" for url in sorted(gone))
    again = predict_rows([(shards[url], indices) for url, indices in wanted.items() if url not in gone], config)
    known = {(r["shard"], r["index"]): r for r in again.to_pylist()}
    mean = _mean_embedding(rows)
    for row in stored.to_pylist():
        if row["shard"] in gone:
            continue
        result.sampled += 1
        found = known.get((row["shard"], row["index"]))
        difference = _difference(row, found, mean)
        if difference:
            result.problems.append(f"{row['shard']} index {row['index']} ({row['key']}): {difference}")
        else:
            result.agreed += 1


def _mean_embedding(rows: pa.Table) -> np.ndarray | None:
    if "embedding" not in rows.column_names:
        return None
    column = rows["embedding"].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return np.asarray(values.astype(np.float64).mean(axis=0))


def _difference(stored: dict[str, Any], found: dict[str, Any] | None, mean: np.ndarray | None) -> str | None:
    """Why two results of one sample are not the same; None if they are."""
    if found is None or found["error"] is not None:
        return f"it is an error row now: {found['message'] if found else 'not found in its shard'}"
    if found["key"] != stored["key"]:
        return f"its key is {found['key']} now"
    if "class_id" in stored and found["class_id"] != stored["class_id"]:
        margin = stored["top_k"][0]["score"] - stored["top_k"][1]["score"] if len(stored["top_k"]) > 1 else 1.0
        if margin > 1e-3:  # closer than that, another processor may well decide otherwise
            return f"class {found['label']} now, {stored['label']} stored"
    if mean is not None:
        a, b = np.asarray(stored["embedding"], np.float64) - mean, np.asarray(found["embedding"], np.float64) - mean
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = float(a @ b / norm) if norm else float(np.allclose(a, b))
        if cosine < SAMPLE_MIN_COSINE:
            return f"the centred cosine of its embeddings is {cosine:.4f}"
    return None
