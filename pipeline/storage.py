"""Local disks and object stores behind one small surface: list, open, put, put if absent, delete.

Every call has a deadline and retries what is transient; errors come out as those of `pipeline.errors`. Listings
are never cached. A put is atomic: on an object store one PUT (a multipart upload above 5 GiB, whose completion is
atomic), on a local disk a rename. It answers with the version it wrote, taken from the store's own answer (on a
local disk from the temporary file), never from a look afterwards, since that could be somebody else's write.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

from fsspec.utils import glob_translate
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from pipeline.backends import Backend, FileInfo, backend, canonical, is_local, local_path, sweep
from pipeline.config import Storage
from pipeline.errors import (
    NotFound,
    PipelineError,
    PreconditionFailed,
    SourceChanged,
    StoreUnavailable,
    translate,
)

__all__ = ["FileInfo", "Store", "canonical", "is_local", "join", "local_path", "split_pattern"]

WILDCARDS = re.compile(r"[*?\[]")
T = TypeVar("T")


def join(url: str, *names: str) -> str:
    return "/".join((url.rstrip("/"), *names))


def split_pattern(url: str) -> tuple[str, bool]:
    """The folder above the first wildcard and whether there is a wildcard at all."""
    found = WILDCARDS.search(url)
    return (url[: found.start()].rpartition("/")[0], True) if found else (url, False)


class Store:
    """All files that one set of storage options reaches. Picklable; connections are made in each process."""

    def __init__(self, options: Storage | None = None) -> None:
        self.options = options or Storage()

    def find(self, url: str) -> list[FileInfo]:
        """All files below a folder, sorted by URL; [] if there is no such folder (an object store knows none)."""
        return self._retry(lambda b: sorted(b.find(canonical(url).rstrip("/")), key=_by_url), "list", url)

    def glob(self, pattern: str) -> list[FileInfo]:
        """The files that a pattern with `*`, `?`, `[…]` or `**` matches, sorted by URL."""
        pattern = canonical(pattern)
        base, _ = split_pattern(pattern)
        matches = re.compile(glob_translate(pattern)).match
        flat = "/" not in pattern[len(base) + 1 :] and "**" not in pattern
        found = self._retry(lambda b: list(b.prefixed(base, "") if flat else b.find(base)), "list", base)
        return sorted((info for info in found if matches(info.url)), key=_by_url)

    def starting_with(self, prefix: str) -> list[FileInfo]:
        """The files directly in a folder whose name begins with the last part of `prefix`."""
        folder, _, name = canonical(prefix).rpartition("/")
        found = self._retry(lambda b: list(b.prefixed(folder, name)), "list", prefix)
        return sorted(found, key=_by_url)

    def info(self, url: str) -> FileInfo:
        """Size and version by one HEAD; NotFound if the file does not exist."""
        return self._retry(lambda b: b.info(canonical(url)), "look up", url)

    def infos(self, urls: list[str]) -> list[FileInfo]:
        """`info` of many files, 16 at a time."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.info, urls))

    def exists(self, url: str) -> bool:
        try:
            self.info(url)
        except NotFound:
            return False
        return True

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        """A seekable stream. With `version`, SourceChanged unless the file still is that version."""
        file, found = self._retry(lambda b: b.open(canonical(url), read_ahead), "open", url)
        if version is not None and found != version:
            file.close()
            raise SourceChanged(f"{url} changed since it was listed. The next run takes the new version.")
        return cast(BinaryIO, _RetryingFile(file, url, self))

    def read(self, url: str) -> bytes:
        with self.open(url) as file:
            return file.read()

    def put(self, url: str, data: bytes | Path) -> str:
        """Write or replace a file atomically, from memory or from a local file; answers its version."""
        return self._retry(lambda b: b.put(canonical(url), data), "write", url)

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Write a file unless one stands there. False may also mean that our own earlier attempt landed."""
        try:
            self._retry(lambda b: b.put_if_absent(canonical(url), data), "write", url)
        except PreconditionFailed:
            return False
        return True

    def delete(self, url: str) -> None:
        """Delete a file; it is no error if it is gone already."""
        with suppress(NotFound):
            self._retry(lambda b: b.delete(canonical(url)), "delete", url)

    def sweep(self, url: str) -> None:
        """Remove what writers that were killed have left below a local folder."""
        if is_local(url):
            sweep(local_path(url))

    def _retry(self, call: Callable[[Backend], T], doing: str, url: str) -> T:
        def attempt() -> T:
            try:
                return call(self._backend(url))
            except (PipelineError, NotImplementedError):
                raise
            except Exception as cause:
                raise translate(cause, doing, url) from cause

        return self.retrying()(attempt)

    def retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.2, max=8),
            stop=stop_after_delay(self.options.deadline_s),
            reraise=True,
        )

    def _backend(self, url: str) -> Backend:
        return backend(canonical(url), self.options)


def _by_url(info: FileInfo) -> str:
    return info.url


class _RetryingFile(io.RawIOBase):
    """A stream whose reads are repeated at the same place when the store fails, and whose errors are ours."""

    def __init__(self, file: IO[bytes], url: str, store: Store) -> None:
        self._file, self._url, self._store = file, url, store

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._file.read(-1 if size is None else size)
        except Exception as cause:
            error = translate(cause, "read", self._url)
            if not isinstance(error, StoreUnavailable):
                raise error from cause
        return self._store._retry(lambda _: self._file.read(-1 if size is None else size), "read", self._url)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def seek(self, offset: int, whence: int = 0, /) -> int:
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
