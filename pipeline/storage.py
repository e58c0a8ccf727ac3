"""Local disks and object stores behind one small surface: list, open, read, put, put if absent, delete.

Every call has a deadline and retries what is transient; errors come out as those of `pipeline.errors`. Listings
are never cached. A put is atomic: on an object store one PUT (a multipart upload above 5 GiB, whose completion is
atomic), on a local disk a rename. It answers with the version it wrote, taken from the store's own answer (on a
local disk from the temporary file), never from a look afterwards, since that could be somebody else's write.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fsspec.utils import glob_translate
from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from pipeline.backends import Backend, FileInfo, LocalDisk, Opened, Page, deadline, sweep, time_left
from pipeline.config import Storage
from pipeline.errors import (
    ConfigError,
    NotFound,
    OutcomeUnknown,
    PipelineError,
    PreconditionFailed,
    SourceChanged,
    StoreUnavailable,
    clean,
    redact,
    translate,
)
from pipeline.remote import S3, Fsspec, Web, damaged
from pipeline.urls import absolute, canonical, is_local, literal, local_path, wildcard_at

SHARE_WHEN_DOWN = 0.1  # of the deadline, for a store that has let a whole one pass and has not answered since
SKIP_BYTES = 2**20  # read at once of what nobody wants but the comparison
T = TypeVar("T")
R = TypeVar("R")

_down: set[str] = set()  # such stores, known to this process: else each of a thousand shards would wait its two minutes


def side_by_side(call: Callable[[T], R], items: Iterable[T], at_once: int = 16) -> list[R]:
    """What `call` makes of each item, so many of them at a time. Where one fails, the others are cancelled."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(call, items))


class Store:
    """All files that one set of storage options reaches. Picklable; connections are made in each process."""

    def __init__(self, options: Storage | None = None) -> None:
        self.options = options or Storage()

    def find(self, url: str) -> list[FileInfo]:
        """All files below a folder, sorted by URL; [] if there is no such folder (an object store knows none).

        A bucket that does not exist is a ConfigError.
        """
        return _sorted(self.each_below(url))

    def each_below(self, url: str) -> Iterator[FileInfo]:
        """What `find` finds, in the order in which it is listed: of a million files no more is held than a page."""
        return self._files(_folder(url), "")

    def each_match(self, pattern: str) -> Iterator[FileInfo]:
        """The files that a pattern with `*`, `?`, `[…]` or `**` matches, in the order in which they are listed."""
        pattern = canonical(absolute(pattern))
        begin, _, first = pattern[: wildcard_at(pattern)].rpartition("/")
        if "://" not in begin:
            raise ConfigError(f"{pattern}: a bucket's or a server's name cannot be a pattern.")
        base, prefix, rest = literal(begin), literal(first), pattern[len(begin) + 1 :]
        try:
            matches = re.compile(glob_translate(pattern)).match
        except (ValueError, re.error) as cause:
            raise ConfigError(f"{pattern}: {cause}.") from cause
        depth = None if "**" in rest else rest.count("/") + 1
        found = self._files("file:///" if base == "file://" else base, prefix, depth)
        return (info for info in found if matches(info.url))

    def starting_with(self, prefix: str) -> list[FileInfo]:
        """The files directly in a folder whose name begins with the last part of `prefix`."""
        folder, _, name = canonical(prefix).rpartition("/")
        return _sorted(self._files(folder, name, depth=1))

    def info(self, url: str) -> FileInfo:
        """Size and version by one HEAD; NotFound if the file does not exist."""
        return self._retry(lambda: self._at(url).info(canonical(url)), "look up", url)

    def infos(self, urls: list[str]) -> list[FileInfo]:
        """`info` of many files, 16 at a time."""
        return side_by_side(self.info, urls)

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        """A seekable stream. With `version`, SourceChanged unless the file still is that version.

        It delivers the bytes of the version that was opened or raises SourceChanged, never a mix of two. (On a local
        disk that holds for files that are replaced, not for those that are written to in place.)

        With `read_ahead` it is meant to be read from front to back. Over a line without TLS StoreUnavailable at its
        end says that what came is not what the store has, where its ETag tells.
        """
        opened = self._retry_reading(lambda: self._at(url).open(canonical(url), read_ahead), "open", url)
        if version not in (None, opened.version):
            opened.file.close()
            raise _changed(url)
        return cast(BinaryIO, _RetryingFile(opened, url, self))

    def read(self, url: str, version: str | None = None, limit: int = -1) -> bytes:
        """A whole file, from an object store by one GET, whose checksum is verified; `version` as in `open`.

        With `limit` no more than its first bytes, since a web server may not say how many there are.
        """
        data, found = self._retry_reading(lambda: self._at(url).read(canonical(url), limit), "read", url)
        if version not in (None, found):
            raise _changed(url)
        return data

    def put(self, url: str, data: bytes | Path) -> str:
        """Write or replace a file atomically, from memory or from a local file; answers its version.

        Raises OutcomeUnknown where a store stopped answering: the file may stand all the same, now or later.
        """
        return self._retry_writing(lambda: self._at(url).put(canonical(url), data), url)

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Write a file unless one stands there. False may also mean that our own earlier attempt landed."""
        try:
            self._retry_writing(lambda: self._at(url).put_if_absent(canonical(url), data), url)
        except PreconditionFailed:
            return False
        return True

    def honours_conditions(self, url: str) -> bool:
        """Whether two writers of one file can't both win: `url`, where nothing stands, is put twice and deleted."""
        try:
            self.put_if_absent(url, b"first")
            return not self.put_if_absent(url, b"second")
        finally:
            self.delete(url)

    def delete(self, url: str) -> None:
        """Delete a file; it is no error if it is gone already."""
        with suppress(NotFound):
            self._retry(lambda: self._at(url).delete(canonical(url)), "delete", url)

    def sweep(self, url: str) -> None:
        """Remove what writers that were killed have left below a local folder."""
        if is_local(url):
            sweep(local_path(url))

    def _files(self, folder: str, prefix: str, depth: int | None = None) -> Iterator[FileInfo]:
        """Page by page, each with a deadline of its own, since a listing of a million keys takes minutes."""
        token = None
        while True:
            page, token = self._page(folder, prefix, depth, token)
            yield from page
            if token is None:
                return

    def _page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        return self._retry(lambda: self._at(folder).page(folder, prefix, depth, token), "list", folder)

    def _at(self, url: str) -> Backend:
        return _backend(canonical(url), self.options)

    def _retry(self, call: Callable[[], T], doing: str, url: str) -> T:
        def attempt() -> T:
            try:
                return call()
            except PipelineError:
                raise
            except Exception as cause:
                raise translate(cause, doing, url) from cause

        store = f"{canonical(url).partition('://')[0]} {self.options.model_dump_json()}"
        seconds = min(self.options.deadline_s * (SHARE_WHEN_DOWN if store in _down else 1), time_left())
        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.2, max=8),
            stop=stop_before_delay(seconds),
            reraise=True,
        )
        try:
            with deadline(seconds):
                answer = retrying(attempt)
        except StoreUnavailable:
            _down.add(store)
            raise
        except PipelineError:
            _down.discard(store)
            raise
        _down.discard(store)
        return answer

    def _retry_reading(self, call: Callable[[], T], doing: str, url: str) -> T:
        try:
            return self._retry(call, doing, url)
        except PreconditionFailed as cause:
            raise _changed(url) from cause

    def _retry_writing(self, call: Callable[[], T], url: str) -> T:
        try:
            return self._retry(call, "write", url)
        except StoreUnavailable as cause:
            if is_local(url):
                raise  # the rename came to nothing, so nothing was written
            raise OutcomeUnknown(f"{cause} The file may have been written all the same.") from cause


def _sorted(files: Iterator[FileInfo]) -> list[FileInfo]:
    return sorted(files, key=lambda info: info.url)


def _folder(url: str) -> str:
    return canonical(url) if is_local(url) else canonical(url).rstrip("/")


def _changed(url: str) -> SourceChanged:
    return SourceChanged(f"{redact(url)} changed since it was listed. The next run takes the new version.")


def _backend(url: str, options: Storage) -> Backend:
    if is_local(url):
        return LocalDisk()
    # An inherited filesystem is not fork-safe: each process has its own. Making one costs half a second, which
    # several threads must not each spend.
    with _making:
        return _remote(os.getpid(), url.partition("://")[0], options.model_dump_json())


def _renew_lock() -> None:
    global _making  # noqa: PLW0603 - another thread may have held it while this process was forked
    _making = threading.Lock()


_making = threading.Lock()
os.register_at_fork(after_in_child=_renew_lock)


@functools.lru_cache(maxsize=8)
def _remote(process: int, protocol: str, options: str) -> Backend:
    kind = {"s3": S3, "http": Web, "https": Web}.get(protocol, Fsspec)
    try:
        return kind(protocol, Storage.model_validate_json(options))
    except ImportError as cause:
        raise ConfigError(f"{protocol}:// needs another package, on every node: {clean(cause)}.") from cause
    except (ValueError, TypeError) as cause:
        raise ConfigError(f"cannot use {protocol}:// with this storage section: {clean(cause)}.") from cause


class _RetryingFile(io.RawIOBase):
    """A stream whose reads are repeated at the same place when the store fails, and whose errors are ours.

    Where the content's MD5 is known and the stream is read to its end without going back, what came is compared with
    it before the last bytes are handed out; what is skipped on the way must be read, too.
    """

    def __init__(self, opened: Opened, url: str, store: Store) -> None:
        self._file, self._size, self._md5 = opened.file, opened.size, opened.md5
        self._url, self._store = url, store
        self._hash = hashlib.md5(usedforsecurity=False)
        self._hashed = 0

    def read(self, size: int | None = -1, /) -> bytes:
        count, place = -1 if size is None else size, self._file.tell()

        def again() -> bytes:
            # A disk's file that fails half-way has let go what it had read by then, and stands behind it.
            if self._file.tell() != place:
                self._file.seek(place)
            return self._file.read(count)

        try:
            data = self._store._retry_reading(again, "read", self._url)
        except NotFound as cause:  # it was there when it was opened
            raise _changed(self._url) from cause
        if self._md5 is not None:
            self._compare(data, self._md5)
        return data

    def _compare(self, data: bytes, md5: str) -> None:
        self._hash.update(data)
        self._hashed += len(data)
        if self._hashed >= self._size and self._hash.hexdigest() != md5:
            raise damaged(self._url)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if self._md5 is not None:
            place = offset + (0, self._hashed, self._size)[whence]
            if place < self._hashed:
                self._md5 = None
            while self._hashed < place and self.read(min(place - self._hashed, SKIP_BYTES)):
                pass
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
