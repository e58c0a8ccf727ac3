"""What there is to do: input URLs become shards, each with a stable id and a fingerprint of its present content.

A tar or a Parquet file is a shard. Loose image files are sorted by their path below the input's root and cut into
groups: a path whose hash is 0 modulo the group size begins a group and names it. So a file that comes or goes
changes the one group it falls into, whatever else there is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config import Input, digest
from pipeline.errors import ConfigError, NotFound, SourceChanged
from pipeline.storage import FileInfo, Store, canonical, split_pattern

Kind = Literal["webdataset", "parquet", "files"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".ppm", ".pgm", ".pbm"),
)
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "webdataset": TAR_SUFFIXES,
    "parquet": PARQUET_SUFFIXES,
    "files": IMAGE_SUFFIXES,
}
URL_LIST_SUFFIX = ".txt"


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work and of commitment. `root` and `members` (in order) are those of a group of loose files."""

    url: str
    id: str
    kind: Kind
    fingerprint: str
    size: int  # bytes
    version: str = ""
    root: str = ""
    members: tuple[FileInfo, ...] = ()


def shard_id(url: str) -> str:
    """`<file name reduced to [A-Za-z0-9.-]>-<16 hex digits of the hash of the URL>`; never depends on content."""
    name = re.sub(r"[^A-Za-z0-9.-]", "", url.rpartition("/")[2]).lstrip(".")[:80]
    return f"{name}-{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def discover(config: Input, store: Store) -> list[Shard]:
    """All shards that the input's URLs list now, each once, sorted by id.

    Raises ConfigError for an empty listing (unless allowed), for a URL that matches nothing it could read, and
    for two shards whose ids collide.
    """
    shards = {shard.url: shard for shard in _discover(config, store)}
    if not shards and not config.allow_empty:
        raise ConfigError(
            f"input.url: there is nothing to read under {', '.join(config.urls)}. Check the spelling, the bucket and"
            " input.format, or set input.allow_empty=true if an empty night is fine."
        )
    by_id: dict[str, Shard] = {}
    for shard in shards.values():
        if shard.id in by_id:
            raise ConfigError(f"{shard.url} and {by_id[shard.id].url} have the same shard id {shard.id}. Rename one.")
        by_id[shard.id] = shard
    return [by_id[name] for name in sorted(by_id)]


def current_fingerprint(shard: Shard, store: Store) -> str:
    """The fingerprint of a shard's source as it is now. Raises SourceChanged if it, or a member of it, is gone."""
    try:
        if shard.kind != "files":
            return store.info(shard.url).fingerprint
        return _group_fingerprint(shard.root, store.infos([member.url for member in shard.members]))
    except NotFound as gone:
        raise SourceChanged(f"{shard.url} has gone since it was listed: {gone}") from gone


def _discover(config: Input, store: Store) -> Iterator[Shard]:
    loose: dict[str, dict[str, FileInfo]] = {}
    seen: set[str] = set()
    for url in _expand_lists(config.urls, store):
        is_pattern = split_pattern(url)[1]
        for file in _listing(url, store):
            is_exact = file.url == canonical(url)
            kind = _kind(file.url, config.format, is_exact, chosen=is_exact or is_pattern)
            if kind is None or file.url in seen:
                continue
            seen.add(file.url)
            if kind == "files":
                loose.setdefault(_root(url), {})[file.url] = file
            else:
                yield Shard(file.url, shard_id(file.url), kind, file.fingerprint, file.size, file.version)
    for root, files in loose.items():
        yield from group_files(root, files.values(), config.group_size)


def _expand_lists(urls: Iterable[str], store: Store) -> Iterator[str]:
    """The URLs, with a text file replaced by the URLs in its lines; blank lines and `# comments` are skipped."""
    for url in urls:
        if not url.endswith(URL_LIST_SUFFIX) or split_pattern(url)[1]:
            yield url
            continue
        for line in store.read(url).decode().splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def _listing(url: str, store: Store) -> list[FileInfo]:
    """The files that one URL stands for: a pattern, one file, or everything below a folder."""
    if split_pattern(url)[1]:
        return store.glob(url)
    if not url.endswith("/"):
        try:
            return [store.info(url)]
        except NotFound:
            pass
    return store.find(url)


def _root(url: str) -> str:
    """The folder that loose files of this URL are named relative to."""
    base, is_pattern = split_pattern(canonical(url))
    if not is_pattern and base.lower().endswith(IMAGE_SUFFIXES):
        return base.rpartition("/")[0]
    return base.rstrip("/")


def _kind(url: str, wanted: Kind | Literal["auto"], is_exact: bool, chosen: bool) -> Kind | None:
    """How to read a file; None if it is not input.

    A file that the URL names exactly must be readable; one that was at least `chosen` by a pattern is read in the
    format that the config demands, whatever its suffix; below a folder only known suffixes count.
    """
    name = url.rpartition("/")[2].lower()
    if name.startswith(("_", ".")) and not is_exact:
        return None  # such as _SUCCESS, or what another writer has not finished
    for kind, suffixes in SUFFIXES.items():
        if wanted in ("auto", kind) and name.endswith(suffixes):
            return kind
    if chosen and wanted != "auto":
        return wanted
    if is_exact:
        raise ConfigError(
            f"input.url: cannot tell how to read {url}. Set input.format to webdataset, parquet or files."
        )
    return None


def group_files(root: str, files: Iterable[FileInfo], group_size: int) -> Iterator[Shard]:
    """Cut loose files below `root` into shards of `group_size` samples on average, named `<root>#<first path>`."""
    begin = ""
    members: list[FileInfo] = []
    for file in sorted(files, key=lambda f: f.url):
        path = relative(root, file.url)
        if _begins_group(path, group_size):
            if members:
                yield _group(root, begin, members)
            begin, members = path, []
        members.append(file)
    if members:
        yield _group(root, begin, members)


def relative(root: str, url: str) -> str:
    return url.removeprefix(root).lstrip("/")


def _begins_group(path: str, group_size: int) -> bool:
    return int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16], 16) % group_size == 0


def _group(root: str, begin: str, members: list[FileInfo]) -> Shard:
    url = f"{root}#{begin}"
    size = sum(m.size for m in members)
    return Shard(url, shard_id(url), "files", _group_fingerprint(root, members), size, "", root, tuple(members))


def _group_fingerprint(root: str, members: Iterable[FileInfo]) -> str:
    return digest([[relative(root, m.url), m.size, m.version] for m in members])
