"""The rows that travel through the pipeline, in two stages: samples with bytes or pixels, then predictions.

Every row carries its identity `(shard, index)`, where `shard` is the shard's place in the plan. Besides samples there
are markers: the reader ends each shard with `END`, whose index is the number of samples, or with `ABANDONED`, whose
message says why the shard stays open.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline.errors import Reject


class Kind(enum.IntEnum):
    SAMPLE = 0
    ERROR = 1
    END = 2
    ABANDONED = 3
    ENCODED = 4  # a sample whose `pixels` are a JPEG still, which the predictor decodes on its device


@dataclass(slots=True)
class Row:
    """One row before it becomes part of a block; `data` are a sample's bytes, None where there are none to be had."""

    shard: int
    kind: Kind
    index: int
    key: str | None = None
    data: bytes | None = None
    reject: Reject | None = None

    def rejected(self, reject: Reject) -> Row:
        """The error row that this sample becomes."""
        return Row(self.shard, Kind.ERROR, self.index, self.key, self.data, reject)


IDENTITY = pa.schema([("shard", pa.int32()), ("kind", pa.uint8()), ("index", pa.int64()), ("key", pa.string())])
VERDICT = pa.schema(
    [
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("bytes_sha256", pa.string()),
        ("num_bytes", pa.int64()),
    ]
)
SAMPLES = pa.schema([*IDENTITY, *VERDICT, ("data", pa.large_binary())])
# uint8 (pixel_height, pixel_width, 3) in C order; of ENCODED rows the file's bytes, (number of bytes, 1). width and
# height are the original's, upright.
PIXELS = pa.schema(
    [
        *IDENTITY,
        *VERDICT,
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pixel_height", pa.int32()),
        ("pixel_width", pa.int32()),
        ("pixels", pa.large_binary()),
    ]
)


def identity_and_verdict(rows: list[Row]) -> dict[str, pa.Array]:
    """The columns of IDENTITY and VERDICT for these rows. Where there were no bytes, their hash is null."""
    rejects = [row.reject for row in rows]
    known = [row.data if row.kind is Kind.ERROR else None for row in rows]
    return {
        "shard": pa.array([row.shard for row in rows], pa.int32()),
        "kind": pa.array([row.kind for row in rows], pa.uint8()),
        "index": pa.array([row.index for row in rows], pa.int64()),
        "key": pa.array([row.key for row in rows], pa.string()),
        "stage": pa.array([r and r.stage for r in rejects], pa.string()),
        "error": pa.array([r and r.error for r in rejects], pa.string()),
        "message": pa.array([r and r.message for r in rejects], pa.string()),
        "bytes_sha256": pa.array([None if d is None else hashlib.sha256(d).hexdigest() for d in known], pa.string()),
        "num_bytes": pa.array([None if d is None else len(d) for d in known], pa.int64()),
    }


@dataclass(frozen=True)
class Columns:
    """Which columns a dataset has: what of a network's outputs is stored."""

    top_k: int  # classes per image; 0: no predictions
    embedding_dtype: Literal["float16", "float32"] | None  # None: no embeddings
    embedding_dim: int  # the width D of the pooled embedding

    def results(self) -> list[pa.Field]:
        """The columns that the predictor adds to a sample."""
        top = pa.struct([("class_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())])
        fields = [
            pa.field("class_id", pa.int32()),
            pa.field("label", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("top_k", pa.list_(top)),
        ]
        dtype = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        embedding = pa.field("embedding", pa.list_(dtype, self.embedding_dim))
        return (fields if self.top_k else []) + ([embedding] if self.embedding_dtype else [])

    def pieces(self) -> pa.Schema:
        """What leaves the predictor: every kind of row; the result columns are null for all but samples."""
        return pa.schema([*IDENTITY, *VERDICT, ("width", pa.int32()), ("height", pa.int32()), *self.results()])
