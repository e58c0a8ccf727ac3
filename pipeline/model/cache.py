"""What a node keeps between processes: fetched weights, converted networks, resolved models, shipped sources.

It lies in `$RESNET_BATCH_CACHE`, else in `~/.cache/resnet-batch`. Everything appears there by a rename, so a file
that exists is whole even if its writer was killed, and everything is named after what it was made from. So what is
there is read without a lock, and a cache that was filled beforehand may be read-only. Nothing is ever removed but what
is damaged: delete the directory to free the space.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.config import Storage, digest
from pipeline.errors import AccessDenied, ConfigError, FatalError, WeightsError, clean, redact, translate
from pipeline.storage import Store
from pipeline.urls import expanded

log = logging.getLogger(__name__)

CHUNK = 8 * 2**20  # bytes
MAX_WEIGHTS_BYTES = 16 * 2**30  # more than any network needs; a server could go on sending for ever
WEIGHTS_ADVICE = "Or download them and give the file's path as model.weights."


def cache_directory(kind: str) -> Path:
    """The cache's folder for one kind of thing, created if need be. FatalError where it can't be written."""
    try:
        folder = cache_path(kind)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ConfigError) as error:
        raise _not_writable(error) from error
    return folder


def cache_path(kind: str) -> Path:
    """Where that folder is, whether it is there or not."""
    return Path(expanded(_root()), kind)


def _root() -> str:
    return os.environ.get("RESNET_BATCH_CACHE") or "~/.cache/resnet-batch"


def _not_writable(cause: Exception) -> FatalError:
    return FatalError(
        f"cannot write to the cache directory {_root()}: {clean(cause)}. Set RESNET_BATCH_CACHE to a folder"
        " that this process may write to."
    )


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Held by one process of this node at a time; the system releases it when its holder dies. FatalError where the
    cache can't be written."""
    path = cache_directory("locks") / f"{digest(name)}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(path))
        except OSError as error:
            raise _not_writable(error) from error
        yield


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A file to write to, gone when the block ends unless it was given another name."""
    path = folder / f".tmp-{uuid.uuid4().hex}"  # not tempfile's, which other users may not read
    try:
        path.touch(exist_ok=False)
    except OSError as error:
        raise _not_writable(error) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well."""
    with _temporary(path.parent) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` when the block ends well. Call it under a lock."""
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise _not_writable(error) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        try:
            temporary.rename(path)
        except OSError as error:
            raise _not_writable(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the content on the disk before the name, so that a power cut leaves no empty file under a good name."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def keep(kind: str, key: str | None, value: Any) -> None:
    """Keep what JSON can hold under this name; with None nowhere. Where it can't be kept, it is found again."""
    if key is None:
        return
    try:
        with new_file(cache_directory(kind) / f"{key}.json") as temporary:
            temporary.write_text(json.dumps(value))
    except (OSError, FatalError) as error:
        log.warning("found again in every process: %s", clean(error))


def recall(kind: str, key: str | None) -> Any | None:
    """What was kept under this name, None if nothing was, or nothing that can be read."""
    if key is None:
        return None
    path = cache_path(kind) / f"{key}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("cannot read %s: %s", path, clean(error))
        return None


def fetch(url: str, storage: Storage, sha256: str | None = None, advice: str = WEIGHTS_ADVICE) -> Path:
    """The weights file behind a URL, named by its sha256; with a known `sha256` once per node.

    Raises WeightsError if it can't be fetched or is not the file that `sha256` says, AccessDenied. `advice` ends the
    message where it can't be fetched.
    """
    folder = cache_directory("weights")
    suffix = Path(url.split("?", 1)[0]).suffix
    kept = folder / f"{sha256}{suffix}"
    if sha256 is not None and file_sha256(kept) == sha256:
        return kept
    with lock(url):
        if sha256 is not None and file_sha256(kept) == sha256:  # another process has fetched it meanwhile
            return kept
        with _temporary(folder) as temporary:
            found = _download(url, storage, temporary, advice)
            check_sha256(found, sha256, url)
            return temporary.replace(folder / (found + suffix))


def check_sha256(found: str, expected: str | None, url: str) -> None:
    if expected is not None and found != expected:
        raise WeightsError(
            f"the weights {redact(url)} have the sha256 {found}, expected was {expected}: another file than the one"
            " that was asked for, or than the one that the driver saw. Check model.weights and model.sha256."
        )


def file_sha256(path: Path) -> str | None:
    """The hash of a file's content, None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, storage: Storage, path: Path, advice: str) -> str:
    """Stream a URL into a file and return the sha256 of what came."""
    hasher = hashlib.sha256()
    try:
        with Store(storage).open(url) as source, path.open("wb") as target:
            while chunk := source.read(CHUNK):
                hasher.update(chunk)
                target.write(chunk)
                if target.tell() > MAX_WEIGHTS_BYTES:
                    raise WeightsError(f"{redact(url)} sends more than {MAX_WEIGHTS_BYTES} bytes")
    except AccessDenied:
        raise
    except Exception as cause:
        error = translate(cause, "read", url)
        if isinstance(error, AccessDenied):
            raise error from cause
        raise WeightsError(f"cannot fetch the weights: {clean(error)}. {advice}") from cause
    return hasher.hexdigest()
