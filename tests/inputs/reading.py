"""What the tests of readers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Input
from pipeline.inputs.readers import read
from pipeline.inputs.shards import Shard, discover
from pipeline.rows import Row
from pipeline.storage import Store

Found = list[tuple[str | None, bytes | str]]  # key, and the bytes or the error class


def shards_of(path: Path, **config: Any) -> tuple[list[Shard], Input]:
    settings = Input(url=str(path), **config)
    return discover(settings, Store()), settings


def samples(path: Path, store: Store | None = None, **config: Any) -> list[Row]:
    """The samples of the only shard; their indices must be 0..n-1, and only the last may lack a key."""
    (shard,), settings = shards_of(path, **config)
    result = list(read(shard, settings, store or Store()))
    assert [sample.index for sample in result] == list(range(len(result)))
    assert all(sample.key is not None for sample in result[:-1])
    return result


def found(path: Path, **config: Any) -> Found:
    return [(s.key, s.data if s.reject is None else s.reject.error) for s in samples(path, **config)]


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path
