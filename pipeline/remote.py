"""The kinds of store that are not this machine's disk: S3, and for reading whatever else fsspec reaches.

As in `backends.py`, URLs are canonical and errors are the store's own.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any, cast
from xml.etree import ElementTree

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.spec import AbstractBufferedFile

from pipeline.backends import FileInfo, Opened, Page, deadline, time_left
from pipeline.config import Storage
from pipeline.errors import ConfigError, StoreUnavailable, redact

READ_AHEAD = 8 * 2**20  # bytes
COPY_BYTES = 2**20  # at once, of a file that only comes as a whole
LIST_PAGE = 1000  # keys; S3's limit
MAX_SINGLE_PUT = 5 * 2**30  # bytes; S3's limit
MULTIPART_CHUNK = 64 * 2**20  # bytes; of at most 10,000
SLOWEST_UPLOAD = 2**20  # bytes a second; what is slower counts as hanging
# What tells two contents of one URL apart, best first.
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest")
TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime")


class Fsspec:
    """Any filesystem of fsspec, for reading. Writing needs a store that answers with the version it wrote."""

    def __init__(self, protocol: str, options: Storage) -> None:
        self._connect_s, self._deadline_s = options.connect_timeout_s, options.deadline_s
        arguments = self._arguments(options)
        self.fs = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **arguments)

    def _arguments(self, options: Storage) -> dict[str, Any]:
        return dict(options.options)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.fs, AsyncFileSystem):
            return getattr(self.fs, method)(*args, **kwargs)
        return self._within(getattr(self.fs, f"_{method}"), *args, **kwargs)

    def _within(self, call: Any, *args: Any, limit_s: float = float("inf"), num_bytes: int = 0, **kwargs: Any) -> Any:
        """Run a coroutine of the filesystem: until the deadline, or for `limit_s`, and longer with `num_bytes` to send.

        An attempt that begins just before the deadline is given the time in which an error would be answered, so
        that the store's last word is that error.
        """
        left_s = max(time_left(), self._connect_s)
        return sync(self.fs.loop, call, *args, timeout=min(limit_s, left_s) + num_bytes / SLOWEST_UPLOAD, **kwargs)

    def page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        root = self.fs._strip_protocol(folder)
        found = self._call("find", folder, maxdepth=depth, detail=True)
        files = ((folder + name.removeprefix(root), d) for name, d in found.items() if d["type"] == "file")
        return [_info(url, details) for url, details in files if url.startswith(f"{folder}/{prefix}")], None

    def info(self, url: str) -> FileInfo:
        details = self._call("info", url)
        if details["type"] != "file":
            raise FileNotFoundError(f"{url} is a folder")
        return _info(url, details)

    def open(self, url: str, read_ahead: bool) -> Opened:
        info = self.info(url)
        return Opened(self.fs.open(url, "rb", **_cache(read_ahead)), info.version, info.size)

    def read(self, url: str, limit: int = -1) -> tuple[bytes, str]:
        opened = self.open(url, read_ahead=False)
        with opened.file as file:
            return file.read(limit), opened.version

    def put(self, url: str, data: bytes | Path) -> str:
        raise self._read_only(url)

    def put_if_absent(self, url: str, data: bytes) -> None:
        raise self._read_only(url)

    def delete(self, url: str) -> None:
        raise self._read_only(url)

    def _read_only(self, url: str) -> ConfigError:
        return ConfigError(f"cannot write to {url}: an output is a local folder or an s3:// URL.")


def _info(url: str, details: dict[str, Any]) -> FileInfo:
    return FileInfo(url, int(details["size"] or 0), _version(details))


def _cache(read_ahead: bool) -> dict[str, Any]:
    return {"cache_type": "readahead", "block_size": READ_AHEAD} if read_ahead else {"cache_type": "none"}


def _version(details: dict[str, Any]) -> str:
    for name in (*VERSIONS, *TIMES):
        if details.get(name):
            return str(details[name]).strip('"')
    return f"size-{details.get('size')}"


class Web(Fsspec):
    """Files of a web server, which must answer requests for ranges of those above 8 MiB."""

    def _arguments(self, options: Storage) -> dict[str, Any]:
        from aiohttp import ClientTimeout

        # No limit on the whole of a request: aiohttp's own of five minutes would cut off large files.
        timeout = ClientTimeout(sock_connect=options.connect_timeout_s, sock_read=options.read_timeout_s)
        return {"client_kwargs": {"timeout": timeout}}

    def page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        raise ConfigError(
            f"cannot list {folder}: a web server has no listings. Name each file, or a .txt list of them."
        )

    def read(self, url: str, limit: int = -1) -> tuple[bytes, str]:
        opened = self.open(url, read_ahead=False, limit=limit)
        with opened.file as file:
            return file.read(limit), opened.version

    def open(self, url: str, read_ahead: bool, limit: int = -1) -> Opened:
        """With `limit`, a file of which the server names no length may end there."""
        from fsspec.implementations.http import HTTPStreamFile

        details = self._call("info", url)
        tag = str(details.get("ETag", ""))
        # Where the server has ETags, it refuses every range of another version.
        headers = {"If-Match": tag} if tag.startswith('"') else {}
        file: IO[bytes] = self.fs.open(url, "rb", headers=headers, **_cache(read_ahead))
        if isinstance(file, HTTPStreamFile):  # the server names no length, or takes no requests for ranges
            whole = tempfile.SpooledTemporaryFile(READ_AHEAD)  # noqa: SIM115 - who opens it closes it
            with file as stream:
                while (limit < 0 or whole.tell() < limit) and (data := stream.read(COPY_BYTES)):
                    whole.write(data)
            size = whole.tell()
            whole.seek(0)
            return Opened(cast("IO[bytes]", whole), _version(details), size)
        return Opened(file, _version(details), int(details["size"] or 0))


# --- S3 ------------------------------------------------------------------------------------------------------------


class S3(Fsspec):
    """S3 and what speaks like it. A version is an ETag without its quotes."""

    def __init__(self, protocol: str, options: Storage) -> None:
        super().__init__(protocol, options)
        self._within(self.fs.set_session)  # says what is wrong with the options
        self.fs._s3.meta.events.register("before-parse.s3.ListObjectsV2", _take_contents)
        self._is_plain = str(self.fs._s3.meta.endpoint_url).startswith("http://")
        self.fs.retries = 1  # ours are around it, with a deadline
        # Nothing else ends a PUT that gets no answer, and it should be tried again before the deadline.
        self._write_s = options.connect_timeout_s + 2 * options.read_timeout_s

    def _arguments(self, options: Storage) -> dict[str, Any]:
        config = {
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": 3},
        }
        given = dict(options.options)
        endpoint = {"endpoint_url": options.endpoint_url} if options.endpoint_url else {}
        return {**endpoint, **given, "config_kwargs": config | given.get("config_kwargs", {})}

    def page(self, folder: str, prefix: str, depth: int | None, token: str | None) -> Page:
        bucket, path = _bucket_and_key(folder)
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{path}/{prefix}" if path else prefix}
        query |= ({"Delimiter": "/"} if depth == 1 else {}) | ({"ContinuationToken": token} if token else {})
        answer = self._call("call_s3", "list_objects_v2", MaxKeys=LIST_PAGE, **query)
        files = [
            FileInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], _unquoted(entry))
            for entry in answer.get("Contents", ())
            if not entry["Key"].endswith("/")  # a console's placeholder for a folder
        ]
        return files, answer["NextContinuationToken"] if answer.get("IsTruncated") else None

    def info(self, url: str) -> FileInfo:
        head = self._object("head_object", url)
        return FileInfo(url, head["ContentLength"], _unquoted(head))

    def open(self, url: str, read_ahead: bool) -> Opened:
        head = self._object("head_object", url)
        info = FileInfo(url, head["ContentLength"], _unquoted(head))
        return Opened(_S3File(self, info, read_ahead), info.version, info.size, self._md5(head) if read_ahead else None)

    def read(self, url: str, limit: int = -1) -> tuple[bytes, str]:
        data, answer = self.get(url)
        md5 = self._md5(answer)
        if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise damaged(url)
        return data if limit < 0 else data[:limit], _unquoted(answer)

    def get(self, url: str, **conditions: str) -> tuple[bytes, dict[str, Any]]:
        """One GET: its body, and what was answered. The deadline includes the body."""
        bucket, key = _bucket_and_key(url, is_file=True)

        async def get() -> tuple[bytes, dict[str, Any]]:
            answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **conditions)
            try:
                return await answer["Body"].read(), answer
            finally:
                answer["Body"].close()

        found: tuple[bytes, dict[str, Any]] = self._within(get)
        return found

    def _md5(self, answer: dict[str, Any]) -> str | None:
        """The MD5 of an object, where the line has no TLS, which would protect it, and the ETag is its MD5."""
        tag = _unquoted(answer)
        is_keyed = "kms" in str(answer.get("ServerSideEncryption")) or "SSECustomerAlgorithm" in answer
        return tag if self._is_plain and not is_keyed and re.fullmatch("[0-9a-f]{32}", tag) else None

    def put(self, url: str, data: bytes | Path) -> str:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if isinstance(data, Path) and size > MAX_SINGLE_PUT:
            return self._put_multipart(url, data)
        with data.open("rb") if isinstance(data, Path) else nullcontext(data) as body:
            return _unquoted(self._object("put_object", url, size, Body=body))

    def put_if_absent(self, url: str, data: bytes) -> None:
        self._object("put_object", url, len(data), Body=data, IfNoneMatch="*")

    def delete(self, url: str) -> None:
        self._object("delete_object", url)

    def _put_multipart(self, url: str, path: Path) -> str:
        """Each part has a deadline of its own."""
        upload = self._object("create_multipart_upload", url)["UploadId"]
        parts: list[dict[str, Any]] = []
        try:
            with path.open("rb") as file:
                while chunk := file.read(MULTIPART_CHUNK):
                    part = {"UploadId": upload, "PartNumber": len(parts) + 1}
                    with deadline(self._deadline_s):
                        answer = self._object("upload_part", url, len(chunk), Body=chunk, **part)
                    parts.append({"PartNumber": part["PartNumber"], "ETag": answer["ETag"]})
            whole = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
            with deadline(self._deadline_s):
                return _unquoted(self._object("complete_multipart_upload", url, **whole))
        except BaseException:
            with suppress(Exception):  # best effort: parts that nobody completes cost money
                self._object("abort_multipart_upload", url, UploadId=upload)
            raise

    def _object(self, method: str, url: str, num_bytes: int = 0, **kwargs: Any) -> dict[str, Any]:
        """A request about one object, with a body of `num_bytes`."""
        bucket, key = _bucket_and_key(url, is_file=True)
        limit_s = self._write_s if "Body" in kwargs else float("inf")
        answer: dict[str, Any] = self._within(
            self.fs._call_s3, method, Bucket=bucket, Key=key, limit_s=limit_s, num_bytes=num_bytes, **kwargs
        )
        return answer


class _S3File(AbstractBufferedFile):  # type: ignore[misc]
    """Reads one version of an object, range by range: the store refuses ranges of any other."""

    def __init__(self, store: S3, info: FileInfo, read_ahead: bool) -> None:
        super().__init__(store.fs, info.url, size=info.size, **_cache(read_ahead))
        self._store, self._info = store, info

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._store.get(self._info.url, Range=f"bytes={start}-{end - 1}", IfMatch=f'"{self._info.version}"')[0]


def _take_contents(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Parse the files of a listing and leave botocore the rest: a page of 1,000 takes 25 ms of CPU instead of 65.

    A hook of botocore's: what is put into the second dictionary replaces what it finds itself.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])  # noqa: S314 - the parser that botocore uses
    except ElementTree.ParseError:
        return  # botocore says what is wrong
    space = root.tag.removesuffix("ListBucketResult")
    names = {f"{space}{name}": name for name in ("Key", "Size", "ETag")}
    found: list[dict[str, Any]] = []
    for contents in root.findall(f"{space}Contents"):
        entry: dict[str, Any] = {names[child.tag]: child.text or "" for child in contents if child.tag in names}
        found.append(entry | {"Size": int(entry["Size"])})
        root.remove(contents)
    customized_response_dict["Contents"] = found
    response_dict["body"] = ElementTree.tostring(root)


def damaged(url: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{redact(url)} arrived damaged: the MD5 of what came is not its ETag. Use an https:// endpoint, or run again;"
        " if that does not help, the object itself is damaged, or its ETag is no MD5."
    )


def _unquoted(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def _bucket_and_key(url: str, is_file: bool = False) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{url} names no bucket.")
    if is_file and (not key or key.endswith("/")):
        raise FileNotFoundError(f"{url} is a folder")
    return bucket, key
