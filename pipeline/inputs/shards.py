"""What there is to do: input URLs become shards, each with a stable id and a fingerprint of its present content.

A tar or a Parquet file is a shard. Loose image files are sorted by their path below the input's root and cut into
groups: a path whose hash is 0 modulo the group size begins a group and names it. So a file that comes or goes
changes the one group it falls into, whatever else there is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pipeline.backends import FileInfo
from pipeline.config import Input, digest
from pipeline.config_errors import has_secret
from pipeline.errors import ConfigError, NotFound, SourceChanged, redact
from pipeline.storage import Store, side_by_side
from pipeline.urls import (
    absolute,
    canonical,
    is_local,
    is_pattern,
    is_relative,
    local_path,
    split_pattern,
    stripped,
    within,
)

log = logging.getLogger(__name__)

ShardKind = Literal["webdataset", "parquet", "files"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".avif", ".avifs"),
    # Not read, but images all the same: they become error rows instead of being passed over in silence.
    *(".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jpm"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".dib", ".ico", ".tga", ".psd", ".psb", ".eps", ".svg"),
)
SUFFIXES: dict[ShardKind, tuple[str, ...]] = {
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
    kind: ShardKind
    fingerprint: str
    size: int  # bytes
    version: str = ""
    root: str = ""
    members: tuple[FileInfo, ...] = ()


def shard_id(url: str) -> str:
    """`<file name reduced to [A-Za-z0-9.-]>-<16 hex digits of the hash of the URL>`; never depends on content."""
    name = re.sub(r"[^A-Za-z0-9.-]", "", url.rpartition("/")[2]).lstrip(".")[:80]
    return f"{name}-{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


Keep = Callable[[Shard], bool]


def discover(config: Input, store: Store, keep: Keep | None = None, output: str | None = None) -> list[Shard]:
    """All shards that the input's URLs list now, each once, sorted by id: the order of URLs and listings is nothing.

    `keep` is asked of every shard that is no group, one at a time, and those that it refuses are left out: a plan
    over millions has room for those to do, but not for all. The files of the dataset at `output` are never input, even
    where it lies below an input's folder.

    Raises ConfigError for a URL under which there is nothing to read (unless `allow_empty`), for a file that is
    named and cannot be told how to read, for a shard whose URL no dataset can hold, and for two whose ids collide.
    """
    found = _Found(config, keep, output)
    empty: list[str] = []
    urls = list(dict.fromkeys(_expand_lists(config.urls, store, empty)))
    empty += [said for said in side_by_side(lambda url: found.take(_listing(url, store)), urls) if said]
    if not config.allow_empty and (empty or not urls):
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ConfigError(
            f"input.url: there is nothing to read under {', '.join(empty[:5] or config.urls)}{more}. Check the"
            " spelling, the bucket and input.format, or set input.allow_empty=true if that is fine."
        )
    return found.shards()


def printable(text: str) -> str:
    """Names that are not UTF-8 carry surrogates, which no Arrow string can hold: as `\\udcff` they can stay."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_printable(text: str) -> bool:
    return printable(text) == text


def current_fingerprint(shard: Shard, store: Store) -> str:
    """The fingerprint of a shard's source as it is now. Raises SourceChanged if it, or a member of it, is gone."""
    try:
        if shard.kind != "files":
            return store.info(shard.url).fingerprint
        return _group_fingerprint(shard.root, store.infos([member.url for member in shard.members]))
    except NotFound as gone:
        raise SourceChanged(f"{shard.url} has gone since it was listed: {gone}") from gone


@lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    """A folder by the name that it has without links, which a listing follows."""
    return os.path.realpath(local_path(folder)) if is_local(folder) else folder


class _Found:
    """What listings bring, from several threads at once."""

    def __init__(self, config: Input, keep: Keep | None, output: str | None) -> None:
        self._config, self._keep = config, keep
        self._output = _real(canonical(output).rstrip("/")) if output else None
        self._kept: list[Shard] = []
        self._urls: dict[str, str] = {}  # of all shards, by id
        self._loose: dict[str, tuple[str, FileInfo]] = {}
        self._lock = threading.Lock()

    def take(self, listing: _Listing) -> str:
        """Take what is input. Returns what was listed where there is none, else nothing."""
        listed = found = 0
        for file in listing.files:
            listed += 1
            kind = _kind(listing, file, self._config.format)
            if kind is None or self._is_own(file.url):
                continue
            found += 1
            if kind == "files":
                self._add_loose(listing.root, file)
            else:
                self._add(Shard(file.url, shard_id(file.url), kind, file.fingerprint, file.size, file.version))
        if found < listed:
            log.info("%d files of %d are input: %s", found, listed, redact(listing.url))
        return "" if found else f"{redact(listing.url)} ({listed or 'no'} files)"

    def _is_own(self, url: str) -> bool:
        folder, _, name = url.rpartition("/")
        if name == "README.md":
            return _real(folder) == self._output
        return name.endswith(".parquet") and _real(folder) in [f"{self._output}/{ours}" for ours in ("data", "errors")]

    def shards(self) -> list[Shard]:
        """All that were kept, groups of loose files among them, sorted by id."""
        roots: dict[str, list[FileInfo]] = {}
        for root, file in self._loose.values():
            roots.setdefault(root, []).append(file)
        for root, files in roots.items():
            for group in group_files(root, files, self._config.group_size):
                self._add(group)
        return sorted(self._kept, key=lambda shard: shard.id)

    def _add_loose(self, root: str, file: FileInfo) -> None:
        with self._lock:
            # Where roots lie in each other, the outermost names the file: an inner one changes nothing then.
            other = self._loose.get(file.url, (root,))[0]
            self._loose[file.url] = min(root, other, key=len), file

    def _add(self, shard: Shard) -> None:
        if not is_printable(shard.url):
            raise ConfigError(f"input.url: {printable(shard.url)} has a name that is not UTF-8. Rename it.")
        with self._lock:
            known = self._urls.get(shard.id)
            if known is None:
                self._urls[shard.id] = shard.url
                if shard.kind == "files" or self._keep is None or self._keep(shard):
                    self._kept.append(shard)
            elif known != shard.url or shard.kind == "files":  # a file may be listed twice, a group is made once
                raise ConfigError(f"input.url: {shard.url} and {known} have the same id {shard.id}. Rename one.")


# --- Listings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Listing:
    """What one URL stands for: a file, the files that a pattern matches, or all below a folder."""

    url: str
    how: Literal["file", "pattern", "folder"]
    root: str  # loose files are named relative to it; it has no slash at its end
    files: Iterable[FileInfo]


def _expand_lists(urls: Iterable[str], store: Store, empty: list[str]) -> Iterator[str]:
    """The URLs, with a text file replaced by its lines; a line that is no URL and no absolute path is meant relative
    to the text file's own folder. Files without a line are added to `empty`."""
    for url in urls:
        if not url.endswith(URL_LIST_SUFFIX) or is_pattern(url):
            yield url
            continue
        folder = canonical(url).rpartition("/")[0]
        lines = _lines(url, store)
        if not lines:
            empty.append(f"{redact(url)} (no lines)")
        for line in lines:
            if line.endswith(URL_LIST_SUFFIX):
                raise ConfigError(f"input.url: {url} names another list, {line}. Name it in input.url itself.")
            if has_secret(line):
                raise ConfigError(
                    f"input.url: the list {redact(url)} names {redact(line)} with a password or a signature, which"
                    " would be written into the dataset. Leave it out, and let the environment hold what the store"
                    " asks for."
                )
            named = within(folder, line) if is_relative(line) else line
            if is_local(named) and not is_local(url):
                raise ConfigError(
                    f"input.url: the list {redact(url)} is not on this machine, but names a file that is: {named}. Name"
                    " it in input.url itself."
                )
            yield named


def _lines(url: str, store: Store) -> list[str]:
    """The lines that are not blank and do not begin with `#`, without the blanks around them."""
    try:
        text = store.read(url).decode("utf-8-sig", "surrogateescape")
    except NotFound as missing:
        raise ConfigError(f"input.url: the list {url} is not there. {missing}") from missing
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def _listing(url: str, store: Store) -> _Listing:
    if is_pattern(url):
        return _Listing(url, "pattern", stripped(split_pattern(canonical(absolute(url)))[0]), store.each_match(url))
    if not url.endswith("/"):
        with suppress(NotFound):
            file = store.info(url)
            return _Listing(url, "file", file.url.rpartition("/")[0], [file])
    return _Listing(url, "folder", stripped(canonical(url)), store.each_below(url))


def _kind(listing: _Listing, file: FileInfo, wanted: ShardKind | Literal["auto"]) -> ShardKind | None:
    """How to read a file; None if it is not input.

    What a URL names or matches is read in the format that the config demands, whatever its suffix; below a folder
    only known suffixes count. Raises ConfigError for a named file where neither tells.
    """
    path = relative(listing.root, file.url)
    name = path.rpartition("/")[2].lower()
    is_image = wanted in ("auto", "files") and name.endswith(IMAGE_SUFFIXES)
    if not name or _is_hidden(path, relative(listing.root, canonical(listing.url)), is_image):
        return None
    for kind, suffixes in SUFFIXES.items():
        if wanted in ("auto", kind) and name.endswith(suffixes):
            return kind
    if wanted != "auto" and listing.how != "folder":
        return wanted
    if listing.how == "file":
        raise ConfigError(
            f"input.url: cannot tell how to read {redact(file.url)}. Set input.format to webdataset, parquet or files."
        )
    return None


def _is_hidden(path: str, asked: str, is_image: bool) -> bool:
    """Whether a file or a folder on its path begins with `_` or `.`, such as `_SUCCESS`, `_temporary/…` or
    `.a.tar.part`, though the URL does not spell such a name itself. Of an image's own name `_` says nothing: writers
    leave no images behind, and cameras call photographs `_MG_1234.JPG`."""
    folder = path[: path.rfind("/") + 1]
    looked_at = {".": path, "_": folder if is_image else path}
    return any(f"/{mark}" in f"/{part}" and f"/{mark}" not in f"/{asked}" for mark, part in looked_at.items())


# --- Loose files ---------------------------------------------------------------------------------------------------


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
    """The path below a root. A key of an object store may begin with a slash of its own, which stays."""
    return url.removeprefix(root).removeprefix("/")


def _begins_group(path: str, group_size: int) -> bool:
    if not is_printable(path):
        return False  # no dataset can hold it as a part of the group's name
    return int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16], 16) % group_size == 0


def _group(root: str, begin: str, members: list[FileInfo]) -> Shard:
    url = f"{root}#{begin}"
    size = sum(m.size for m in members)
    return Shard(url, shard_id(url), "files", _group_fingerprint(root, members), size, "", root, tuple(members))


def _group_fingerprint(root: str, members: Iterable[FileInfo]) -> str:
    return digest([[relative(root, m.url), m.size, m.version] for m in members])
