"""A shard's bytes become samples, one after the other, in flat memory and always in the same order.

What is wrong with the data (a truncated tar, a null image) comes out as a sample with a `Reject`, at the next
index. What is wrong with the store, or a source that is no longer the planned one, is raised: the shard stays open.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Input
from pipeline.errors import NotFound, Reject, SourceChanged, clean
from pipeline.inputs.shards import IMAGE_SUFFIXES, Shard, relative
from pipeline.storage import FileInfo, Store, is_local

MAX_IMAGE_BYTES = 512 * 2**20  # a larger member or file is no photograph
TAR_BUFFER = 2**20
PARQUET_BUFFER = 2**20  # read per column and step, so that memory does not depend on the size of a row group
PARQUET_BATCH_ROWS = 32
FILES_AHEAD = 16
TAR_DAMAGE = (Reject, EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error)
# WebDataset: the key is the path up to the first dot of the file name, the rest is the extension.
WEBDATASET_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard: its bytes, or the reason why there are none."""

    index: int
    key: str | None
    data: bytes = b""
    reject: Reject | None = None


def read(shard: Shard, config: Input, store: Store) -> Iterator[Sample]:
    """The samples of a shard with indices 0..n-1.

    Raises StoreUnavailable or AccessDenied when the store does not deliver, SourceChanged when the shard is gone or
    no longer the planned version.
    """
    items = {"webdataset": _read_tar, "parquet": _read_parquet, "files": _read_files}[shard.kind]
    index = -1
    try:
        for index, (key, content) in enumerate(items(shard, config, store)):
            name = None if key is None else key.encode("utf-8", "backslashreplace").decode()
            if isinstance(content, Reject):
                yield Sample(index, name, reject=content)
            else:
                yield Sample(index, name, content)
    except Reject as reject:  # the shard itself ends here; what came before is kept
        yield Sample(index + 1, None, reject=reject)
    except NotFound as gone:
        raise SourceChanged(f"{shard.url} has gone since it was listed: {gone}") from gone


Items = Iterator[tuple[str | None, bytes | Reject]]


def _broken(error: str, message: str) -> Reject:
    return Reject("read", error, message)


# --- WebDataset tars -----------------------------------------------------------------------------------------------


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is damaged or cut off for the end of the archive, which would lose the rest."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as cause:  # type: ignore[attr-defined]
            raise _broken("truncated_shard", "the tar ends without its end marker") from cause
        except tarfile.HeaderError as cause:
            raise _broken("corrupt_shard", f"a tar header is damaged: {clean(cause)}") from cause


def _read_tar(shard: Shard, config: Input, store: Store) -> Items:
    with store.open(shard.url, shard.version) as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if shard.url.endswith("gz") else raw)
        try:
            yield from _keyed(_tar_images(stream))
        except (EOFError, tarfile.ReadError) as cause:
            raise _broken("truncated_shard", f"the tar is cut off: {clean(cause)}") from cause
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error) as cause:
            raise _broken("corrupt_shard", f"the tar is damaged: {clean(cause)}") from cause


def _tar_images(stream: BinaryIO) -> Iterator[tuple[str, str, bytes | Reject]]:
    """(key, member name, bytes) of every image. Streams: no seek, and no list of members that grows."""
    with tarfile.open(
        fileobj=stream, mode="r|", bufsize=TAR_BUFFER, tarinfo=_StrictTarInfo, errors="surrogateescape"
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            name = WEBDATASET_NAME.match(member.name)
            if name is None or member.isdir() or not member.name.lower().endswith(IMAGE_SUFFIXES):
                continue
            yield name[1], member.name, _tar_member(tar, member)


def _tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Reject:
    if not member.isreg():
        return _broken("not_a_regular_member", "a link, device or pipe; links are never followed")
    if member.size > MAX_IMAGE_BYTES:
        return _broken("member_too_large", f"{member.size} bytes, more than {MAX_IMAGE_BYTES}")
    file = tar.extractfile(member)
    assert file is not None, "a regular member has content"
    return file.read()


def _keyed(images: Iterator[tuple[str, str, bytes | Reject]]) -> Items:
    """The key of a lone image is its sample's key; images that share a sample go by their member names.

    Looks one sample ahead: only the next key tells whether a sample has one image. What was held back is given out
    even if the tar turns out to be damaged behind it.
    """
    held: list[tuple[str, str, bytes | Reject]] = []
    damage: Exception | None = None
    try:
        for image in images:
            if held and held[0][0] != image[0]:
                yield from _named(held)
                held = []
            held.append(image)
    except TAR_DAMAGE as found:
        damage = found
    yield from _named(held)
    if damage is not None:
        raise damage


def _named(images: list[tuple[str, str, bytes | Reject]]) -> Items:
    for key, member, content in images:
        yield (key if len(images) == 1 else member), content


# --- Parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(shard: Shard, config: Input, store: Store) -> Items:
    with store.open(shard.url, shard.version, read_ahead=False) as raw:
        try:
            file = pq.ParquetFile(raw, buffer_size=PARQUET_BUFFER, pre_buffer=False)
            columns, image = _parquet_columns(file.schema_arrow, config)
            row = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns, use_threads=False):
                yield from _parquet_rows(batch, image, config.key, row)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as cause:
            raise _broken("corrupt_shard", f"the Parquet file is damaged: {clean(cause)}") from cause


def _parquet_columns(schema: pa.Schema, config: Input) -> tuple[list[str], str]:
    """The columns to read and the one that holds images."""
    candidates = [f.name for f in schema if _holds_bytes(f.type)]
    image = config.image or (candidates[0] if len(candidates) == 1 else None)
    if image is None or image not in candidates:
        raise _broken(
            "missing_column",
            f"image column {image!r} is not there or holds no bytes" if image else "not one image column, but "
            f"{len(candidates)}: set input.image to one of {', '.join(schema.names)}",
        )  # fmt: skip
    columns = [image]
    if pa.types.is_struct(schema.field(image).type):
        columns = [f"{image}.{f.name}" for f in schema.field(image).type if f.name in ("bytes", "path")]
    if config.key is not None:
        if config.key not in schema.names:
            raise _broken("missing_column", f"key column {config.key!r} is not among {', '.join(schema.names)}")
        columns.append(config.key)
    return columns, image


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _holds_bytes(f.type) for f in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _parquet_rows(batch: pa.RecordBatch, image: str, key: str | None, first_row: int) -> Items:
    images = batch.column(image).to_pylist()
    keys: list[Any] = batch.column(key).to_pylist() if key is not None else [None] * batch.num_rows
    for offset, value in enumerate(images):
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        name = next((str(k) for k in (keys[offset], path) if k is not None), str(first_row + offset))
        yield name, _broken("null_image", "the image is null") if data is None else data


# --- Loose files ---------------------------------------------------------------------------------------------------


def _read_files(shard: Shard, config: Input, store: Store) -> Items:
    for member, content in _in_order(shard.members, store):
        yield relative(shard.root, member.url), content


def _in_order(members: tuple[FileInfo, ...], store: Store) -> Iterator[tuple[FileInfo, bytes | Reject]]:
    """Contents in the members' order; from a remote store several are fetched ahead, since each waits for answers."""
    if not members or is_local(members[0].url):
        yield from ((member, _read_file(member, store)) for member in members)
        return
    pending: deque[tuple[FileInfo, Future[bytes | Reject]]] = deque()
    with ThreadPoolExecutor(FILES_AHEAD) as pool:
        for member in members:
            pending.append((member, pool.submit(_read_file, member, store)))
            if len(pending) >= FILES_AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _read_file(member: FileInfo, store: Store) -> bytes | Reject:
    if member.size > MAX_IMAGE_BYTES:
        return _broken("member_too_large", f"{member.size} bytes, more than {MAX_IMAGE_BYTES}")
    with store.open(member.url, member.version, read_ahead=False) as file:
        return file.read()
