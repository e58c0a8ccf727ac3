"""A shard's bytes become samples, one after the other, in flat memory and always in the same order.

What is wrong with the data (a truncated tar, a null image) comes out as a sample with a `Reject`, at the next
index. What is wrong with the store, or a source that is no longer the planned one, is raised: the shard stays open.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Input
from pipeline.errors import NotFound, Reject, SourceChanged, clean
from pipeline.inputs.shards import IMAGE_SUFFIXES, Shard, printable, relative
from pipeline.rows import Kind, Row
from pipeline.storage import FileInfo, Store, is_local

MAX_IMAGE_BYTES = 512 * 2**20  # a larger member, value or file is no photograph
MAX_HEADER_BYTES = 4 * 2**20  # of one member, with its long name and extended attributes
MAX_MEMBER_BYTES = 2**43  # of any member: to seek behind 2**44 is an error on many disks
TAR_BUFFER = 2**20
TAR_PADDING = 16 * 2**20  # how far behind the end of a compressed tar its checksum is looked for
PARQUET_BUFFER = 4 * 2**20  # read per column and step; a request each on an object store
PARQUET_BATCH_ROWS = 8  # of full-size images at once; larger batches are no faster
FILES_AHEAD = 16
GZIP_MAGIC = b"\x1f\x8b"
# What else could be under a tar's name, so that the message can say it.
OTHER_MAGIC = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x04\x22\x4d\x18": "LZ4",
    b"PK\3\4": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "Parquet",
    b"<": "XML or HTML",
}
# POSIX: "<length of the record> <keyword>=<value>\n"
PAX_RECORD = re.compile(rb"(\d{1,9}) [^=]+=")
# WebDataset: the key is the path up to the first dot of the file name, the rest is the extension.
WEBDATASET_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard: its bytes, or the reason why there are none."""

    index: int
    key: str | None
    data: bytes = b""
    reject: Reject | None = None

    def row(self, shard: int) -> Row:
        """As a row of the `shard`-th shard of a plan."""
        if self.reject is None:
            return Row(shard, Kind.SAMPLE, self.index, self.key, self.data)
        return Row(shard, Kind.ERROR, self.index, self.key, reject=self.reject)


Content = bytes | Reject
Items = Iterator[tuple[str | None, Content]]  # key and content of each sample


def read(shard: Shard, config: Input, store: Store) -> Iterator[Sample]:
    """The samples of a shard with indices 0..n-1; what is damaged behind them is one more, without a key.

    Raises StoreUnavailable or AccessDenied when the store does not deliver, SourceChanged when the shard is gone or
    no longer the planned version.
    """
    items = {"webdataset": _read_tar, "parquet": _read_parquet, "files": _read_files}[shard.kind]
    try:
        for index, (key, content) in enumerate(items(shard, config, store)):
            name = None if key is None else printable(key)
            if isinstance(content, Reject):
                yield Sample(index, name, reject=content)
            else:
                yield Sample(index, name, content)
        if shard.version and is_local(shard.url) and store.info(shard.url).version != shard.version:
            # An object store refuses to go on with another version. A disk delivers what is written meanwhile.
            raise SourceChanged(f"{shard.url} changed while it was read. The next run takes the new version.")
    except NotFound as gone:
        raise SourceChanged(f"{shard.url} has gone since it was listed: {gone}") from gone


def _broken(error: str, message: str) -> Reject:
    return Reject("read", error, printable(message))


def _within_limit(data: bytes) -> Content:
    return data if len(data) <= MAX_IMAGE_BYTES else _too_large(len(data))


def _too_large(size: int) -> Reject:
    return _broken("member_too_large", f"{size} bytes, more than {MAX_IMAGE_BYTES}")


# --- WebDataset tars -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    """An image in a tar: its sample's key, its own name, and its content. Without both names: damage."""

    key: str | None
    name: str | None
    content: Content


def _read_tar(shard: Shard, config: Input, store: Store) -> Items:
    with store.open(shard.url, shard.version) as raw:
        yield from _keyed(_tar_images(raw))


def _keyed(images: Iterator[_Member]) -> Items:
    """The key of a lone image is its sample's key; images that share a sample go by their own names.

    Holds one image back, since the next one may belong to the same sample.
    """
    held: _Member | None = None
    shared = False  # the image that is held belongs with the one before it
    for image in chain(images, (None,)):
        together = held is not None and image is not None and image.key == held.key
        if held is not None:
            yield (held.name if shared or together else held.key), held.content
        held, shared = image, together


def _tar_images(raw: BinaryIO) -> Iterator[_Member]:
    """Every image of a tar, and at the end what is damaged, if anything is. Streams: memory does not grow."""
    damage: Reject | None = None
    begin, is_tar = b"", False
    try:
        buffered = io.BufferedReader(cast(io.RawIOBase, raw), TAR_BUFFER)
        begin = buffered.peek(len(GZIP_MAGIC))[:16]
        is_gzip = begin.startswith(GZIP_MAGIC)
        stream = _TarStream(cast(BinaryIO, gzip.GzipFile(fileobj=buffered)) if is_gzip else buffered)
        # Not tarfile's own stream mode, which copies its buffer for every member.
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, stream), tarinfo=_StrictTarInfo, errors="surrogateescape")
        while (member := _next_member(tar, stream)) is not None:
            is_tar = True
            name = WEBDATASET_NAME.match(member.name)
            if name is not None and not member.isdir() and member.name.lower().endswith(IMAGE_SUFFIXES):
                yield _Member(name[1], member.name, _tar_content(member, stream))
        if is_gzip:
            stream.finish()
    except Reject as found:
        damage = found
    except EOFError as cause:
        damage = _broken("truncated_shard", f"the tar is cut off: {clean(cause)}")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error) as cause:
        damage = _broken("corrupt_shard", f"the tar is damaged: {clean(cause)}")
    while raw.read(TAR_BUFFER):  # at whose end the store may find that the bytes were damaged on their way
        pass
    if damage is not None:
        yield _Member(None, None, damage if is_tar else _no_tar(begin) or damage)


def _no_tar(begin: bytes) -> Reject | None:
    other = next((name for magic, name in OTHER_MAGIC.items() if begin.startswith(magic)), None)
    return _broken("corrupt_shard", f"this is {other}; tars are read plain or compressed by gzip") if other else None


def _next_member(tar: tarfile.TarFile, stream: _TarStream) -> tarfile.TarInfo | None:
    stream.allowance = MAX_HEADER_BYTES
    member = tar.next()
    tar.members.clear()  # type: ignore[attr-defined]  # a list that grows otherwise
    # Attributes for all that follows, which pile up header after header; each may be within its allowance.
    if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > MAX_HEADER_BYTES:
        raise _broken("corrupt_shard", f"tar attributes for all members of more than {MAX_HEADER_BYTES} bytes")
    return member


def _tar_content(member: tarfile.TarInfo, stream: _TarStream) -> Content:
    if not member.isreg() or member.issparse():
        return _broken("not_a_regular_member", "a link, device, pipe or sparse file; links are never followed")
    if member.size > MAX_IMAGE_BYTES:
        return _too_large(member.size)
    stream.allowance = member.size
    return stream.read(member.size)


class _TarStream:
    """What tarfile needs of a file: forward only, as a compressed one is, and with an allowance for what it reads.

    tarfile holds headers in memory, whatever size they claim, and a compressed tar can make them huge for little.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._again = b""
        self.allowance = MAX_HEADER_BYTES  # bytes

    def read(self, size: int) -> bytes:
        self.allowance -= size
        if self.allowance < 0 or size < 0:
            raise _broken("corrupt_shard", f"a tar header of more than {MAX_HEADER_BYTES} bytes")
        data, self._again = self._again or self._stream.read(size), b""
        self._position += len(data)
        if len(data) < size:
            missing = f"{size - len(data)} bytes or more and its end marker are missing"
            raise _broken("truncated_shard", f"the tar is cut off: {missing}")
        return data

    def read_again(self, data: bytes) -> None:
        """Give the next read what the last one gave; it must be for as much, and before any seek."""
        self._again = data
        self._position -= len(data)
        self.allowance += len(data)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        _check_size(position - self._position)
        if position > self._position:
            self._position = self._stream.seek(position)
        return self._position

    def finish(self) -> None:
        """Read what pads the tar, behind which gzip compares its checksum."""
        for _ in range(TAR_PADDING // TAR_BUFFER):
            if not self._stream.read(TAR_BUFFER):
                return


def _check_size(size: int) -> None:
    if not 0 <= size < MAX_MEMBER_BYTES:
        raise _broken("corrupt_shard", "a tar member has a negative or absurd size")


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a header that is damaged or cut off for the end of the archive, which would lose the rest."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        # tarfile would take zlib's errors for the end, too; the last four come out of its parsers of long headers.
        except (tarfile.HeaderError, zlib.error, ValueError, LookupError, ArithmeticError, RecursionError) as cause:
            raise _broken("corrupt_shard", f"a tar header is damaged: {clean(cause)}") from cause
        if not member.issparse():  # whose size is not what it takes here; `seek` looks at that
            _check_size(member.size)
        return member

    def _proc_pax(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Python before 3.11.13 takes what it can of damaged attributes: an image may lose its name and be none."""
        stream = cast(_TarStream, tar.fileobj)
        body = stream.read(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if not _is_pax(body[: self.size]):
            raise _broken("corrupt_shard", "the attributes of a tar member are damaged")
        stream.read_again(body)
        try:
            return cast(tarfile.TarInfo, super()._proc_pax(tar))  # type: ignore[misc]
        except tarfile.SubsequentHeaderError as cause:  # type: ignore[attr-defined]
            # Attributes for all that follows may be followed by nothing; those of one member may not.
            if self.type == tarfile.XGLTYPE and isinstance(cause.__context__, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise cause.__context__ from None
            raise


def _is_pax(body: bytes) -> bool:
    """Whether these are records of the right lengths, as Python 3.11.13 asks for them."""
    at = 0
    while at < len(body) and body[at]:
        found = PAX_RECORD.match(body, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(body) or body[end - 1] != ord("\n"):
            return False
        at = end
    return True


# --- Parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(shard: Shard, config: Input, store: Store) -> Items:
    with store.open(shard.url, shard.version, read_ahead=False) as raw:
        try:
            # With a buffer, a column chunk is read page by page; memory then depends on the pages alone.
            file = pq.ParquetFile(raw, buffer_size=PARQUET_BUFFER, pre_buffer=False, page_checksum_verification=True)
            yield from _parquet_images(file, config)
        except Reject as damage:
            yield None, damage
        except (pa.ArrowException, OSError, ValueError) as cause:
            yield None, _broken("corrupt_shard", f"the Parquet file is damaged: {clean(cause)}")


def _parquet_images(file: pq.ParquetFile, config: Input) -> Items:
    image, columns = _parquet_columns(file.schema_arrow, config)
    row = 0
    for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns, use_threads=False):
        yield from _parquet_rows(batch, image, config.key, row)
        row += batch.num_rows
    if row != file.metadata.num_rows:
        raise _broken("corrupt_shard", f"the Parquet file has {row} rows and claims {file.metadata.num_rows}")


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
        raise _broken("missing_column", f"{number} bytes; set input.image to one of {columns}")
    if image not in found or schema.names.count(image) > 1:
        raise _broken("missing_column", f"input.image={image} is not one column of bytes among {columns}")
    if config.key is not None and (schema.names.count(config.key) != 1 or not _is_text(schema.field(config.key).type)):
        raise _broken("missing_column", f"input.key={config.key} is not one column of texts or numbers among {columns}")
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
        yield name, _within_limit(data) if data is not None else _null()


def _null() -> Reject:
    return _broken("null_image", "there are no bytes in this row; a path without bytes is not opened")


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


# --- Loose files ---------------------------------------------------------------------------------------------------


def _read_files(shard: Shard, config: Input, store: Store) -> Items:
    for member, content in _in_order(shard.members, store):
        yield relative(shard.root, member.url), content


def _in_order(members: tuple[FileInfo, ...], store: Store) -> Iterator[tuple[FileInfo, Content]]:
    """Contents in the members' order; from a remote store several are fetched ahead, since each waits for answers."""
    if not members or is_local(members[0].url):
        yield from ((member, _read_file(member, store)) for member in members)
        return
    pending: deque[tuple[FileInfo, Future[Content]]] = deque()
    with ThreadPoolExecutor(FILES_AHEAD) as pool:
        for member in members:
            pending.append((member, pool.submit(_read_file, member, store)))
            if len(pending) >= FILES_AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _read_file(member: FileInfo, store: Store) -> Content:
    if member.size > MAX_IMAGE_BYTES:
        return _too_large(member.size)
    limit = -1 if member.size else MAX_IMAGE_BYTES + 1  # where a web server has named no size, anything may come
    data = store.read(member.url, member.version, limit)
    return data if len(data) <= MAX_IMAGE_BYTES else _broken("member_too_large", f"more than {MAX_IMAGE_BYTES} bytes")
