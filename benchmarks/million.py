"""A store that lists millions of files which nobody has written: an fsspec filesystem that answers as S3 does, page by
page, from text files that are sorted by key. It holds no more than a page.

    make_listings(folder, shards=1_000_000, done=999_000)
    with listed_from(folder):
        make_plan(make_config(CONFIG))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline import storage
from pipeline.backends import FileInfo
from pipeline.inputs.shards import shard_id
from pipeline.outputs.ledger import Mark, commit_hash

CONFIG = {
    "input": {"url": "s3://raw/images/**/*.tar"},
    "model": {"name": "resnet18"},
    "output": {"url": "s3://labels/million"},
}
SHARDS_PER_FOLDER = 10_000
ERRORS_EVERY = 20  # one of so many shards has an errors part
FOLDER = "LISTINGS"  # the environment variable that says where the listings lie


def make_listings(folder: Path, shards: int, done: int) -> None:
    """Write what a bucket of `shards` tars lists, and a dataset in which the first `done` of them are committed."""
    lines: dict[str, list[str]] = {"raw": [], "_ledger": [], "data": [], "errors": []}
    for number in range(shards):
        key = f"images/{number // SHARDS_PER_FOLDER:04}/photographs-{number:07}.tar"
        file = FileInfo(f"s3://raw/{key}", 110_000_000 + number, _etag("raw", number))
        lines["raw"].append(f"{key}\t{file.size}\t{file.version}")
        if number >= done:
            continue
        name, part = shard_id(file.url), _etag("data", number)
        errors = None if number % ERRORS_EVERY else _etag("errors", number)
        mark = Mark(name, file.fingerprint, commit_hash(part, errors))
        lines["_ledger"].append(f"million/_ledger/{mark.name}\t400\t{_etag('mark', number)}")
        lines["data"].append(f"million/data/{name}.parquet\t4000000\t{part}")
        if errors is not None:
            lines["errors"].append(f"million/errors/{name}.parquet\t9000\t{errors}")
    for name, found in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in sorted(found)))


def _etag(kind: str, number: int) -> str:
    return f"{hash((kind == 'raw', len(kind), number)) % 2**128:032x}"


@contextmanager
def listed_from(folder: Path) -> Iterator[None]:
    """`s3://` is the listings in this folder, in this process."""
    before = fsspec.get_filesystem_class("s3")
    os.environ[FOLDER] = str(folder)
    fsspec.register_implementation("s3", Listings, clobber=True)
    storage._remote.cache_clear()
    try:
        yield
    finally:
        fsspec.register_implementation("s3", before, clobber=True)
        storage._remote.cache_clear()


class Listings(AsyncFileSystem):
    """As much of s3fs as a listing needs. A continuation token is a place in the text file."""

    protocol = "s3"

    def __init__(self, config_kwargs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._folder = Path(os.environ[FOLDER])
        events = SimpleNamespace(register=lambda *_: None)
        self._s3 = SimpleNamespace(meta=SimpleNamespace(endpoint_url="https://nowhere", events=events))
        self.pages = 0

    async def set_session(self) -> None:
        """There is none."""

    async def _call_s3(
        self, method: str, Prefix: str, MaxKeys: int, ContinuationToken: str = "0", **_: Any
    ) -> dict[str, Any]:
        assert method == "list_objects_v2", method
        name = "raw" if Prefix.startswith("images/") else Prefix.split("/")[1]
        self.pages += 1
        with (self._folder / name).open("rb") as file:
            file.seek(int(ContinuationToken))
            lines = [line for _, line in zip(range(MaxKeys), file, strict=False)]
            end, size = int(ContinuationToken) + sum(map(len, lines)), os.fstat(file.fileno()).st_size
        fields = [line.decode().rstrip("\n").split("\t") for line in lines]
        contents = [{"Key": key, "Size": int(length), "ETag": f'"{etag}"'} for key, length, etag in fields]
        return {"Contents": contents, "IsTruncated": end < size, "NextContinuationToken": str(end)}
