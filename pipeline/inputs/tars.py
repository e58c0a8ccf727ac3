"""WebDataset tars: every image of one, streamed in flat memory, and what is damaged behind them."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, cast

from pipeline.config import Input
from pipeline.errors import Reject, clean
from pipeline.inputs.samples import Content, Items, broken, too_large
from pipeline.inputs.shards import IMAGE_SUFFIXES, Shard
from pipeline.storage import Store

MAX_HEADER_BYTES = 4 * 2**20  # of one member, with its long name and extended attributes
MAX_ATTRIBUTES = 1000  # for all members that follow: tarfile gives them to each
MAX_NAME = 2**16  # characters; a block may hold thousands of names
MAX_MEMBER_BYTES = 2**43  # of any member: to seek behind 2**44 is an error on many disks
TAR_BUFFER = 2**20
TAR_PADDING = 16 * 2**20  # how far behind the end of a compressed tar its checksum is looked for
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
class _Member:
    """An image in a tar: its sample's key, its own name, and its content. Without both names: damage."""

    key: str | None
    name: str | None
    content: Content


def read_tar(shard: Shard, config: Input, store: Store) -> Items:
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
        damage = broken("truncated_shard", f"the tar is cut off: {clean(cause)}")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error) as cause:
        damage = broken("corrupt_shard", f"the tar is damaged: {clean(cause)}")
    while raw.read(TAR_BUFFER):  # at whose end the store may find that the bytes were damaged on their way
        pass
    if damage is not None:
        yield _Member(None, None, damage if is_tar else _no_tar(begin) or damage)


def _no_tar(begin: bytes) -> Reject | None:
    other = next((name for magic, name in OTHER_MAGIC.items() if begin.startswith(magic)), None)
    return broken("corrupt_shard", f"this is {other}; tars are read plain or compressed by gzip") if other else None


def _next_member(tar: tarfile.TarFile, stream: _TarStream) -> tarfile.TarInfo | None:
    stream.allowance = MAX_HEADER_BYTES
    member = tar.next()
    tar.members.clear()  # type: ignore[attr-defined]  # a list that grows otherwise
    # Attributes for all that follows pile up header after header; each may be within its allowance.
    if len(tar.pax_headers) > MAX_ATTRIBUTES:
        raise broken("corrupt_shard", f"it has more than {MAX_ATTRIBUTES} tar attributes for all members")
    if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > MAX_HEADER_BYTES:
        raise broken("corrupt_shard", f"tar attributes for all members of more than {MAX_HEADER_BYTES} bytes")
    if member is not None and len(member.name) > MAX_NAME:
        raise broken("corrupt_shard", f"a tar member's name has {len(member.name)} characters")
    return member


def _tar_content(member: tarfile.TarInfo, stream: _TarStream) -> Content:
    if not member.isreg() or member.issparse():
        return broken("not_a_regular_member", "a link, device, pipe or sparse file; links are never followed")
    if reject := too_large(member.size):
        return reject
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
            raise broken("corrupt_shard", f"a tar header of more than {MAX_HEADER_BYTES} bytes")
        data, self._again = self._again or self._stream.read(size), b""
        self._position += len(data)
        if len(data) < size:
            missing = f"{size - len(data)} bytes or more and its end marker are missing"
            raise broken("truncated_shard", f"the tar is cut off: {missing}")
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
        raise broken("corrupt_shard", "a tar member has a negative or absurd size")


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
            raise broken("corrupt_shard", f"a tar header is damaged: {clean(cause)}") from cause
        if not member.issparse():  # whose size is not what it takes here; `seek` looks at that
            _check_size(member.size)
        return member

    def _proc_pax(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Python before 3.11.13 takes what it can of damaged attributes: an image may lose its name and be none."""
        stream = cast(_TarStream, tar.fileobj)
        body = stream.read(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if not _is_pax(body[: self.size]):
            raise broken("corrupt_shard", "the attributes of a tar member are damaged")
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
