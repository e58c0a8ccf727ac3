"""What `pipeline.storage` asks of a kind of store, and the local disk as one of them; `remote.py` has the others.

URLs are canonical here and errors are the store's own; `storage.Store` retries and translates.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from pipeline.config import digest
from pipeline.urls import local_path

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a store: canonical URL, size in bytes, and a version that changes when the content does."""

    url: str
    size: int
    version: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits over size and version."""
        return digest([self.size, self.version])


Page = tuple[list[FileInfo], str | None]


class Opened(NamedTuple):
    """A stream, and the version of what it reads."""

    file: IO[bytes]
    version: str
    size: int  # bytes
    md5: str | None = None  # of the whole content, where nothing else shows that it arrives undamaged


_ends: ContextVar[float] = ContextVar("ends", default=float("inf"))


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """The time in which a call of a store must end, all its attempts included."""
    token = _ends.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _ends.reset(token)


def time_left() -> float:
    """Seconds to the deadline; infinite without one."""
    return _ends.get() - time.monotonic()


class Backend(Protocol):
    """What a kind of store does."""

    def page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        """Some files whose path below a folder begins with `prefix`, and the token that asks for those after them.

        With `depth` 1 only files directly in the folder; a greater one spares folders that lie deeper where that is
        possible. The first token is None; None answered is the end.
        """

    def info(self, url: str) -> FileInfo: ...

    def open(self, url: str, read_ahead: bool) -> Opened: ...

    def read(self, url: str, limit: int = -1) -> tuple[bytes, str]:
        """A whole file, or the first `limit` bytes of a longer one, and its version."""

    def put(self, url: str, data: bytes | Path) -> str:
        """Write or replace atomically; answers the version that was written."""

    def put_if_absent(self, url: str, data: bytes) -> None: ...

    def delete(self, url: str) -> None: ...


# --- The local disk ------------------------------------------------------------------------------------------------


class LocalDisk:
    def page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        paths = _walk(str(local_path(folder)), prefix, depth)
        return [info for path in paths if (info := _local_info(path))], None

    def info(self, url: str) -> FileInfo:
        path = str(local_path(url))
        info = _local_info(path)
        if info is None:
            raise FileNotFoundError(f"there is no file {path}")
        return info

    def open(self, url: str, read_ahead: bool) -> Opened:
        file = local_path(url).open("rb", buffering=2**20 if read_ahead else -1)
        found = os.fstat(file.fileno())
        return Opened(file, _version_of(found), found.st_size)

    def read(self, url: str, limit: int = -1) -> tuple[bytes, str]:
        opened = self.open(url, read_ahead=False)
        with opened.file as file:
            return file.read(limit), opened.version

    def put(self, url: str, data: bytes | Path) -> str:
        with _Temporary(local_path(url)) as temporary:
            version = temporary.fill(data)
            temporary.path.replace(temporary.target)
        _sync_folder(temporary.target.parent)
        return version

    def put_if_absent(self, url: str, data: bytes) -> None:
        with _Temporary(local_path(url)) as temporary:
            temporary.fill(data)
            try:
                os.link(temporary.path, temporary.target)  # fails if the target exists
            except PermissionError as cause:  # what Linux says where there are no links, as on a USB stick
                raise OSError(errno.EOPNOTSUPP, "its file system has no hard links") from cause
        _sync_folder(temporary.target.parent)

    def delete(self, url: str) -> None:
        local_path(url).unlink()


def _walk(folder: str, prefix: str, depth: int | None) -> Iterator[str]:
    """Paths below a folder, through links. A folder that can't be read is an error; one that is not there is empty."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    above = folder.rstrip("/").count("/")
    for here, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        level = here.rstrip("/").count("/") - above + 1
        if level == 1:
            folders[:] = [name for name in folders if name.startswith(prefix)]
            names = [name for name in names if name.startswith(prefix)]  # noqa: PLW2901
        if level == depth:
            folders.clear()
        yield from (os.path.join(here, name) for name in names)  # noqa: PTH118 - hot


def _local_info(path: str) -> FileInfo | None:
    """None for what is no file (any more): a folder, a pipe, a dangling link, what a writer has not finished."""
    if TEMPORARY.fullmatch(os.path.basename(path)):  # noqa: PTH119 - hot
        return None
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.stat(path)  # noqa: PTH116 - hot
        if stat.S_ISREG(found.st_mode):
            return FileInfo("file://" + path, found.st_size, _version_of(found))
    return None


def _version_of(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


class _Temporary:
    """A locked temporary file in the target's folder. The lock dies with its process: see `sweep`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> _Temporary:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        while os.fstat(self._file.fileno()).st_nlink == 0:  # swept before the lock was ours
            self._file.close()
            self._file = self._locked()
        return self

    def _locked(self) -> IO[bytes]:
        file = self.path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def fill(self, data: bytes | Path) -> str:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, self._file, 2**20)
        else:
            self._file.write(data)
        self._file.flush()
        # Before Linux 6.13 its own stamps move in steps of milliseconds: contents of one size could share a version.
        now = time.time_ns()
        os.utime(self._file.fileno(), ns=(now, now))
        os.fsync(self._file.fileno())
        return _version_of(os.fstat(self._file.fileno()))

    def __exit__(self, *exc: object) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove temporary files below a folder whose writer is dead."""
    for path in leftovers(folder):
        with suppress(OSError):
            path.unlink()


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files below a folder whose writer is dead: a living one holds a lock, which is ours until the next."""
    for path in folder.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            # "r+b", since a network file system locks for writing only what is open for writing.
            with suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
