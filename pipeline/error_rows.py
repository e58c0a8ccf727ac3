"""The error rows of a dataset, counted by class and by shard; and the bytes behind them, written out for a look.

Reads the errors parts alone, in steps, so that memory does not grow with them. For an export the source shards are
read again, each up to the last sample that is wanted. Names come from shards, so they are never taken for paths.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import ConfigError, FatalError, NotFound, SourceChanged, redact
from pipeline.inputs.readers import read
from pipeline.inputs.shards import IMAGE_SUFFIXES, Shard
from pipeline.outputs.dataset import Dataset, undisturbed
from pipeline.outputs.schema import Footer
from pipeline.overview import last_config, listed_shards
from pipeline.rows import Row
from pipeline.storage import Store, side_by_side
from pipeline.urls import is_local

MAX_NAME = 100  # characters of a key that a file name takes over
ROW = ["index", "key", "stage", "error", "bytes_sha256"]
MAGIC = (
    (rb"\xff\xd8\xff", ".jpg"),
    (rb"\x89PNG", ".png"),
    (rb"GIF8", ".gif"),
    (rb"RIFF....WEBP", ".webp"),
    (rb"BM", ".bmp"),
    (rb"II\*\0|MM\0\*", ".tif"),
    (rb"....ftypavi[fs]", ".avif"),
    (rb"....ftyp", ".heic"),
)


@dataclass
class ShardErrors:
    """The error rows of one shard, by class. `without_bytes` are those that stand for no bytes (stage read)."""

    id: str
    shard: str  # URL
    rows: int
    classes: dict[str, int]
    without_bytes: int


@dataclass
class Export:
    """What was written to `folder`. `without_bytes` are error rows that stand for no bytes (stage read); `left_out` are
    those above the limit. `problems` names what could not be exported, and why."""

    folder: str
    files: int = 0
    without_bytes: int = 0
    left_out: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class DeadLetters:
    """`classes` are the counts by stage and class, most frequent first; `shards` those with most error rows first.
    `problems` names errors parts that cannot be read."""

    url: str
    rows: int = 0
    classes: list[dict[str, Any]] = field(default_factory=list)
    shards: list[ShardErrors] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    export: Export | None = None


def count_errors(dataset: Dataset, chosen: Collection[str] = ()) -> DeadLetters:
    """Count the error rows of the chosen classes, or all. Raises NotFound where there is no dataset."""
    dataset.known_identity()
    result, total = DeadLetters(dataset.url), Counter[tuple[str, str]]()
    names = dataset.part_ids("errors")
    counted = side_by_side(lambda name: _count(dataset, name, chosen), names, at_once=8)
    for name, found in zip(names, counted, strict=True):
        if isinstance(found, FatalError):
            result.problems.append(str(found))
        elif found is not None:
            result.shards.append(_shard_errors(name, *found))
            total += found[1]
    result.rows = total.total()
    result.classes = [{"stage": s, "error": e, "rows": n} for (s, e), n in sorted(total.items(), key=_by_rows)]
    result.shards.sort(key=lambda shard: (-shard.rows, shard.id))
    return result


def _shard_errors(name: str, url: str, counts: Counter[tuple[str, str]]) -> ShardErrors:
    by_class = Counter[str]()
    for (_, error), rows in counts.items():
        by_class[error] += rows
    without_bytes = sum(rows for (stage, _), rows in counts.items() if stage == "read")
    return ShardErrors(name, redact(url), counts.total(), dict(by_class.most_common()), without_bytes)


def _by_rows(item: tuple[tuple[str, str], int]) -> tuple[int, tuple[str, str]]:
    return -item[1], item[0]


def _count(
    dataset: Dataset, name: str, chosen: Collection[str]
) -> tuple[str, Counter[tuple[str, str]]] | FatalError | None:
    """The shard's URL and its counts by stage and class; None without such rows, or if its part has gone meanwhile."""

    def count() -> tuple[str, Counter[tuple[str, str]]] | None:
        counts = Counter[tuple[str, str]]()
        with dataset.errors_part(name) as part:
            url = Footer.of(part.schema_arrow).shard
            for batch in part.iter_batches(columns=["stage", "error"], use_threads=False):
                pairs = zip(batch["stage"].to_pylist(), batch["error"].to_pylist(), strict=True)
                counts.update((stage, error) for stage, error in pairs if not chosen or error in chosen)
        return (url, counts) if counts else None

    try:
        return undisturbed(count)
    except FatalError as damage:
        return damage


# --- Export ----------------------------------------------------------------------------------------------------------


def export_errors(
    dataset: Dataset,
    found: DeadLetters,
    folder: str | Path,
    limit: int,
    chosen: Collection[str] = (),
    config: JobConfig | None = None,
) -> Export:
    """Write the bytes behind at most `limit` error rows to `<folder>/<shard id>/<index>-<end of the key>`, worst shards
    first.

    Source shards are found with the config, or that of the last run. Raises ConfigError where there is none, or the
    folder cannot be written, and what a store that does not deliver raises.
    """
    if not is_local(str(folder)):
        raise ConfigError(f"{folder} is no local folder: bytes are exported to a disk.")
    if limit < 1:
        raise ConfigError(f"the limit of an export is at least 1; got {limit}.")
    config = config or last_config(dataset, "--export")
    result = Export(str(folder))
    sources = listed_shards(config)
    for errors in found.shards:
        result.without_bytes += errors.without_bytes
        num_rows = errors.rows - errors.without_bytes
        num_wanted = min(num_rows, limit - result.files)
        result.left_out += num_rows - num_wanted
        with suppress(NotFound):
            if num_wanted:
                wanted = undisturbed(partial(_wanted, dataset, errors.id, chosen, num_wanted))
                if wanted is not None:
                    _export_shard(errors, wanted, sources.get(errors.id), config, result)
    return result


@dataclass(frozen=True)
class _Wanted:
    """The rows of one shard to be exported, by index, and the fingerprint that the shard was committed with."""

    rows: dict[int, dict[str, Any]]
    fingerprint: str


def _wanted(dataset: Dataset, name: str, chosen: Collection[str], limit: int) -> _Wanted:
    """The first rows that have bytes."""
    rows: dict[int, dict[str, Any]] = {}
    with dataset.errors_part(name) as part:
        fingerprint = Footer.of(part.schema_arrow).shard_fingerprint
        for batch in part.iter_batches(columns=ROW, use_threads=False):
            for row in batch.to_pylist():
                if row["stage"] != "read" and (not chosen or row["error"] in chosen) and len(rows) < limit:
                    rows[row["index"]] = row
            if len(rows) == limit:
                break
    return _Wanted(rows, fingerprint)


def _export_shard(errors: ShardErrors, wanted: _Wanted, shard: Shard | None, config: JobConfig, result: Export) -> None:
    if shard is None or shard.fingerprint != wanted.fingerprint:
        what = "is no longer in the input" if shard is None else "has changed since it was committed"
        result.problems.append(f"{errors.shard} {what}: {len(wanted.rows)} not exported")
        return
    left = dict(wanted.rows)
    if not left:  # a run has redone the shard since its rows were counted
        return
    try:
        for sample in _samples(shard, max(left), config):
            row = left.pop(sample.index, None)
            if row is None:
                continue
            problem = _problem(sample, row)
            if problem:
                result.problems.append(f"{errors.shard} index {sample.index}: {problem}")
            else:
                assert sample.data is not None, "a sample has bytes"
                name = file_name(sample.index, sample.key, sample.data)
                _write(Path(result.folder, shard.id), name, sample.data)
                result.files += 1
    except SourceChanged as change:
        result.problems.append(f"{change} {len(left)} not exported.")
        return
    if left:
        result.problems.append(f"{errors.shard} ends before index {min(left)}: {len(left)} not exported")


def _samples(shard: Shard, last: int, config: JobConfig) -> Iterator[Row]:
    """Up to this index, and not a sample further."""
    for sample in read(shard, config.input, Store(config.input_storage)):
        yield sample
        if sample.index == last:
            return


def _problem(sample: Row, row: dict[str, Any]) -> str:
    """Why these are not the bytes that the error row is about."""
    if sample.data is None:
        return f"it cannot be read any more: {sample.reject}"
    known = row["bytes_sha256"]
    if known is not None and hashlib.sha256(sample.data).hexdigest() != known:
        return "its bytes are not those that were recorded"
    return ""


def file_name(index: int, key: str | None, data: bytes) -> str:
    """`<index>-<end of the key>`, made of letters, digits, `.`, `_` and `-` alone, with a suffix that fits."""
    tail = re.split(r"[/\\]", key or "")[-1]
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", tail).lstrip(".")
    length = next((len(end) for end in IMAGE_SUFFIXES if safe.lower().endswith(end)), 0)
    stem, suffix = safe[: len(safe) - length], safe[len(safe) - length :]
    guessed = next((end for magic, end in MAGIC if re.match(magic, data, re.S)), ".bin")
    return f"{index}-{stem[:MAX_NAME]}{suffix or guessed}"


def _write(folder: Path, name: str, data: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    except OSError as cause:
        raise ConfigError(f"cannot write {folder / name}: {cause.strerror}. Choose another folder.") from None
