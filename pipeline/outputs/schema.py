"""The columns of the output, and the fixed writer settings that make a part's bytes depend on its rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rows import VERDICT, Columns

FORMAT_VERSION = "1"
ROWS_PER_GROUP = 8192
FOOTER_PREFIX = "resnet_batch."


def part_schema(columns: Columns) -> pa.Schema:
    """The schema of `data/`. Nothing in it is ever null: what has no prediction is an error row."""
    fields = [
        pa.field("key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("index", pa.int64()),
        *columns.results(),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
    return pa.schema(fields)


def errors_schema() -> pa.Schema:
    """The schema of `errors/`. `key`, `bytes_sha256` and `num_bytes` are null where they are not known."""
    return pa.schema([("key", pa.string()), ("shard", pa.string()), ("index", pa.int64()), *VERDICT])


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part says about itself, as strings in its schema metadata under `resnet_batch.…`."""

    shard: str
    shard_fingerprint: str
    model_fingerprint: str
    engine: str
    listed: int
    predicted: int
    errors: int
    last_path: str = ""  # of a group of loose files: they lie between the path in its URL and this one
    format_version: str = FORMAT_VERSION

    def metadata(self) -> dict[str, str]:
        return {f"{FOOTER_PREFIX}{name}": str(getattr(self, name)) for name in self.__slots__}

    def body(self) -> dict[str, str | int]:
        """The content of the shard's mark."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, schema: pa.Schema) -> Footer:
        """The footer of a part that was read. Raises KeyError where it has none."""
        found = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
        values = {name: found[FOOTER_PREFIX + name] for name in cls.__slots__}
        counts = {name: int(values[name]) for name in ("listed", "predicted", "errors")}
        return cls(**{**values, **counts})


def write_parquet(path: Path, schema: pa.Schema, groups: Iterable[pa.Table], footer: Footer) -> None:
    """Stream row groups into one file. Embeddings hardly compress, so they are stored as they are."""
    plain = ("embedding.list.element", "bytes_sha256")
    leaves = _leaf_paths(schema)
    with pq.ParquetWriter(
        path,
        schema.with_metadata(footer.metadata()),
        version="2.6",
        data_page_version="1.0",
        compression={leaf: "NONE" if leaf in plain else "ZSTD" for leaf in leaves},
        use_dictionary=[leaf for leaf in leaves if leaf.rpartition(".")[2] in ("label", "shard", "stage", "error")],
        write_statistics=[leaf for leaf in leaves if leaf not in plain],
        store_schema=True,
        write_page_checksum=True,  # so that `verify` sees a bit that flips in an embedding
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Parquet's names of the leaf columns: `embedding.list.element`, `top_k.list.element.label`, …"""
    return [path for field in schema for path in _leaves(field.name, field.type)]


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves(f"{path}.{child.name}", child.type)]
    return [path]
