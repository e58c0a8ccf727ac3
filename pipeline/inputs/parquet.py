"""Parquet files with a column of images: their rows, in memory that doesn't depend on the size of a row group."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Input
from pipeline.errors import Reject, clean
from pipeline.inputs.samples import Items, broken, too_large
from pipeline.inputs.shards import Shard
from pipeline.storage import Store

PARQUET_BUFFER = 4 * 2**20  # read per column and step; a request each on an object store
PARQUET_BATCH_ROWS = 8  # of full-size images at once; larger batches are no faster


def read_parquet(shard: Shard, config: Input, store: Store) -> Items:
    with store.open(shard.url, shard.version, read_ahead=False) as raw:
        try:
            # With a buffer, a column chunk is read page by page; memory then depends on the pages alone.
            file = pq.ParquetFile(raw, buffer_size=PARQUET_BUFFER, pre_buffer=False, page_checksum_verification=True)
            yield from _parquet_images(file, config)
        except Reject as damage:
            yield None, damage
        except (pa.ArrowException, OSError, ValueError) as cause:
            yield None, broken("corrupt_shard", f"the Parquet file is damaged: {clean(cause)}")


def _parquet_images(file: pq.ParquetFile, config: Input) -> Items:
    image, columns = _parquet_columns(file.schema_arrow, config)
    row = 0
    for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns, use_threads=False):
        yield from _parquet_rows(batch, image, config.key, row)
        row += batch.num_rows
    if row != file.metadata.num_rows:
        raise broken("corrupt_shard", f"the Parquet file has {row} rows and claims {file.metadata.num_rows}")


def _parquet_columns(schema: pa.Schema, config: Input) -> tuple[str, list[str]]:
    """The image column, and the columns to read. Raises Reject where the file has no such columns."""
    found = [f.name for f in schema if _holds_bytes(f.type)]
    # Hashes and the like have a fixed size, so such a column is meant only where there is no other.
    candidates = [n for n in found if not pa.types.is_fixed_size_binary(schema.field(schema.names.index(n)).type)]
    candidates = candidates or found
    image = config.image or (candidates[0] if len(candidates) == 1 else None)
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    if image is None:
        number = "several columns hold" if candidates else "no column holds"
        raise broken("missing_column", f"{number} bytes; set input.image to one of {columns}")
    if image not in found or schema.names.count(image) > 1:
        raise broken("missing_column", f"input.image={image} is not one column of bytes among {columns}")
    if config.key is not None and (schema.names.count(config.key) != 1 or not _is_text(schema.field(config.key).type)):
        raise broken("missing_column", f"input.key={config.key} is not one column of texts or numbers among {columns}")
    kind = schema.field(image).type
    parts = [f"{image}.{f.name}" for f in kind if f.name in ("bytes", "path")] if pa.types.is_struct(kind) else [image]
    return image, parts + ([config.key] if config.key is not None else [])


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and not pa.types.is_struct(f.type) and _holds_bytes(f.type) for f in kind)
    checks = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(check(_plain(kind)) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of a type can be keys."""
    plain = _plain(kind)
    return not pa.types.is_nested(plain.storage_type if isinstance(plain, pa.BaseExtensionType) else plain)


def _parquet_rows(batch: pa.RecordBatch, image: str, key: str | None, first_row: int) -> Items:
    images = batch.column(image)
    unknown: list[str | None] = [None] * batch.num_rows
    keys = _texts(batch.column(key)) if key is not None else unknown
    paths = unknown
    if pa.types.is_struct(images.type):
        parts = dict(zip([f.name for f in images.type], images.flatten(), strict=True))
        images = parts["bytes"]
        paths = _texts(parts["path"]) if "path" in parts and _is_text(parts["path"].type) else unknown
    for offset, data in enumerate(images.to_pylist()):
        name = next((k for k in (keys[offset], paths[offset]) if k is not None), str(first_row + offset))
        yield name, (too_large(len(data)) or data) if data is not None else _null()


def _null() -> Reject:
    return broken("null_image", "there are no bytes in this row; a path without bytes is not opened")


def _texts(values: pa.Array) -> list[str | None]:
    """Values as keys. Files may hold texts that are not UTF-8, which would break off the whole batch."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if isinstance(values, pa.UuidArray):
        return [None if v is None else str(v) for v in values.to_pylist()]
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if not _holds_bytes(values.type):
        values = _as_text(values)
    return [None if v is None else v.decode("utf-8", "backslashreplace") for v in values.cast(pa.binary()).to_pylist()]


def _as_text(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        if not pa.types.is_timestamp(values.type):
            raise
        # Writers use more names of time zones (`Z`, `GMT+2`) than Arrow's database has. Without its zone it is UTC.
        return values.cast(pa.timestamp(values.type.unit)).cast(pa.string())
