"""The two kinds of store under `pipeline.storage`: the local disk, and whatever fsspec reaches.

URLs are canonical here and errors are the store's own; `storage.Store` retries and translates.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from pipeline.config import Storage, digest
from pipeline.errors import ConfigError

MAX_SINGLE_PUT = 5 * 2**30  # bytes; S3's limit
MULTIPART_CHUNK = 256 * 2**20
READ_AHEAD = 8 * 2**20
TEMPORARY = ".tmp"


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


def canonical(url: str) -> str:
    """The one absolute URL of a file, whichever way it was written: `file:///abs/path`, `s3://bucket/key`, …"""
    protocol, _, path = url.rpartition("://")
    if protocol in ("", "file", "local"):
        return "file://" + os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - resolve() would follow links
    if protocol == "memory":
        raise ConfigError(
            f"{url}: memory:// lives in one process, and the workers are others. Use a folder or a bucket."
        )
    return f"{'s3' if protocol in ('s3a', 's3n') else protocol}://{path}"


def is_local(url: str) -> bool:
    return canonical(url).startswith("file://")


def local_path(url: str) -> Path:
    return Path(canonical(url).removeprefix("file://"))


class Backend(Protocol):
    """What a kind of store does."""

    def find(self, url: str) -> Iterator[FileInfo]:
        """Every file below a folder."""

    def prefixed(self, folder: str, prefix: str) -> Iterator[FileInfo]:
        """The files directly in a folder whose name begins with `prefix`."""

    def info(self, url: str) -> FileInfo: ...

    def open(self, url: str, read_ahead: bool) -> tuple[IO[bytes], str]:
        """A stream and the version of what it reads."""

    def put(self, url: str, data: bytes | Path) -> str:
        """Write or replace atomically; answers the version that was written."""

    def put_if_absent(self, url: str, data: bytes) -> None: ...

    def delete(self, url: str) -> None: ...


def backend(url: str, options: Storage) -> Backend:
    if is_local(url):
        return LocalDisk()
    return _remote(url.partition("://")[0], options.model_dump_json())


class LocalDisk:
    def find(self, url: str) -> Iterator[FileInfo]:
        for folder, _, names in os.walk(local_path(url), followlinks=True):
            yield from self._infos(os.path.join(folder, name) for name in names)  # noqa: PTH118 - hot

    def prefixed(self, folder: str, prefix: str) -> Iterator[FileInfo]:
        path = local_path(folder)
        if path.is_dir():
            yield from self._infos(entry.path for entry in os.scandir(path) if entry.name.startswith(prefix))

    def _infos(self, paths: Iterator[str]) -> Iterator[FileInfo]:
        for path in paths:
            # A file may go between its listing and its stat; a folder or a pipe is no file.
            with suppress(FileNotFoundError):
                if os.path.isfile(path) and not path.endswith(TEMPORARY):  # noqa: PTH113 - hot
                    yield FileInfo("file://" + path, *_size_and_version(os.stat(path)))  # noqa: PTH116 - hot

    def info(self, url: str) -> FileInfo:
        path = local_path(url)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder")
        return FileInfo("file://" + str(path), *_size_and_version(path.stat()))

    def open(self, url: str, read_ahead: bool) -> tuple[IO[bytes], str]:
        file = local_path(url).open("rb", buffering=2**20 if read_ahead else -1)
        return file, _size_and_version(os.fstat(file.fileno()))[1]

    def put(self, url: str, data: bytes | Path) -> str:
        with _Temporary(local_path(url)) as temporary:
            version = temporary.fill(data)
            temporary.path.replace(temporary.target)
        _sync_folder(temporary.target.parent)
        return version

    def put_if_absent(self, url: str, data: bytes) -> None:
        with _Temporary(local_path(url)) as temporary:
            temporary.fill(data)
            os.link(temporary.path, temporary.target)  # fails if the target exists
        _sync_folder(temporary.target.parent)

    def delete(self, url: str) -> None:
        local_path(url).unlink()


def _size_and_version(stat: os.stat_result) -> tuple[int, str]:
    return stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}"


class _Temporary:
    """A locked temporary file in the target's folder. The lock dies with its process: see `sweep`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")

    def __enter__(self) -> _Temporary:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def fill(self, data: bytes | Path) -> str:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, self._file, 2**20)
        else:
            self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        return _size_and_version(os.fstat(self._file.fileno()))[1]

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
    """Remove temporary files whose writer is dead: a living one holds a lock."""
    for path in folder.glob(f"*/.*{TEMPORARY}"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class RemoteStore:
    """Any fsspec filesystem for reading; writing needs S3's put, which answers with an ETag and takes conditions."""

    def __init__(self, protocol: str, options: Storage) -> None:
        self.protocol = protocol
        self.deadline_s = options.deadline_s
        extra: dict[str, Any] = {}
        if protocol == "s3":
            timeouts = {"connect_timeout": options.connect_timeout_s, "read_timeout": options.read_timeout_s}
            retries = {"retries": {"mode": "standard", "total_max_attempts": 3}}
            extra = {"config_kwargs": timeouts | retries}
            if options.endpoint_url:
                extra["endpoint_url"] = options.endpoint_url
        if protocol not in ("http", "https"):
            extra |= options.options
        self.fs = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **extra)
        if protocol == "s3":
            self.fs.retries = 1  # ours are around it, with a deadline

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.fs, AsyncFileSystem):
            return sync(self.fs.loop, getattr(self.fs, f"_{method}"), *args, timeout=self.deadline_s, **kwargs)
        return getattr(self.fs, method)(*args, **kwargs)

    def _info(self, details: dict[str, Any]) -> FileInfo:
        name = details["name"]
        url = name if "://" in name else f"{self.protocol}://{name.lstrip('/')}"
        return FileInfo(url, int(details["size"] or 0), _version(details, url))

    def find(self, url: str) -> Iterator[FileInfo]:
        for details in self._call("find", url, detail=True).values():
            if details["type"] == "file":
                yield self._info(details)

    def prefixed(self, folder: str, prefix: str) -> Iterator[FileInfo]:
        if self.protocol == "s3":
            details = self._call("find", folder, prefix=prefix, detail=True).values()
        else:
            details = [
                d for d in self._call("ls", folder, detail=True) if d["name"].rpartition("/")[2].startswith(prefix)
            ]
        for entry in details:
            info = self._info(entry)
            if entry["type"] == "file" and info.url.rpartition("/")[0] == folder.rstrip("/"):
                yield info

    def info(self, url: str) -> FileInfo:
        details = self._call("info", url)
        if details["type"] != "file":
            raise FileNotFoundError(f"{url} is a folder")
        return self._info(details)

    def open(self, url: str, read_ahead: bool) -> tuple[IO[bytes], str]:
        cache = {"cache_type": "readahead", "block_size": READ_AHEAD} if read_ahead else {"cache_type": "none"}
        file = self.fs.open(url, "rb", **cache)
        return file, _version(getattr(file, "details", None) or self._call("info", url), url)

    def put(self, url: str, data: bytes | Path) -> str:
        if isinstance(data, Path) and data.stat().st_size > MAX_SINGLE_PUT:
            return self._put_multipart(url, data)
        with data.open("rb") if isinstance(data, Path) else nullcontext(data) as body:
            return str(self._s3("put_object", url, Body=body)["ETag"]).strip('"')

    def put_if_absent(self, url: str, data: bytes) -> None:
        self._s3("put_object", url, Body=data, IfNoneMatch="*")

    def delete(self, url: str) -> None:
        self._call("rm_file", url)

    def _put_multipart(self, url: str, path: Path) -> str:
        upload = self._s3("create_multipart_upload", url)["UploadId"]
        parts: list[dict[str, Any]] = []
        with path.open("rb") as file:
            while chunk := file.read(MULTIPART_CHUNK):
                number = len(parts) + 1
                answer = self._s3("upload_part", url, UploadId=upload, PartNumber=number, Body=chunk)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        done = self._s3("complete_multipart_upload", url, UploadId=upload, MultipartUpload={"Parts": parts})
        return str(done["ETag"]).strip('"')

    def _s3(self, method: str, url: str, **kwargs: Any) -> dict[str, Any]:
        if self.protocol != "s3":
            raise ConfigError(f"cannot write to {url}: an output is a local folder or an s3:// URL.")
        bucket, _, key = url.removeprefix("s3://").partition("/")
        answer: dict[str, Any] = self._call("call_s3", method, Bucket=bucket, Key=key, **kwargs)
        return answer


def _version(details: dict[str, Any], url: str) -> str:
    """What tells two contents of one URL apart: the ETag or its like, else the time of modification."""
    for name in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "LastModified",
        "last_modified",
        "updated",
        "mtime",
    ):
        if details.get(name):
            return str(details[name]).strip('"')
    return f"size-{details.get('size')}"


@functools.lru_cache(maxsize=8)
def _remote_in(process: int, protocol: str, options: str) -> RemoteStore:
    return RemoteStore(protocol, Storage.model_validate_json(options))


def _remote(protocol: str, options: str) -> RemoteStore:
    # An inherited filesystem is not fork-safe: each process has its own.
    return _remote_in(os.getpid(), protocol, options)
