"""What must hold for a dataset, checked from the outside: while it is written, and when all is done.

`violations` names everything that is wrong with a finished dataset; `Reader` looks at it all the while, as a reader
does who knows nothing but `data/*.parquet`.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from pipeline.config import make_config
from pipeline.inputs.shards import shard_id
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store

LAYOUT = re.compile(
    r"_dataset\.json|README\.md|(data|errors)/[^./][^/]*\.parquet|_ledger/[^./][^/]*\.json|_runs/[^.].*"
)
LOOK_EVERY_S = 0.05
NAMED = 3  # offenders of one kind
Identity = tuple[str, int]


class Place(Protocol):
    """The files of a dataset, seen without our own code."""

    def versions(self, folder: str = "") -> dict[str, object]:
        """What lies below a folder: paths relative to the dataset, and something that changes with their content."""

    def read(self, name: str) -> bytes | None:
        """A whole file, None if it is not there."""

    def uploads(self) -> list[str]:
        """Multipart uploads that were begun and neither completed nor aborted."""


@dataclass(frozen=True)
class OnDisk:
    folder: Path

    def versions(self, folder: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for path in sorted((self.folder / folder).rglob("*")):
            with suppress(FileNotFoundError):
                status = path.stat()
                if not path.is_dir():
                    found[path.relative_to(self.folder).as_posix()] = (status.st_ino, status.st_mtime_ns)
        return found

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError), (self.folder / name).open("rb") as file:
            return file.read()
        return None

    def uploads(self) -> list[str]:
        return []


@dataclass(frozen=True)
class InBucket:
    client: Any  # botocore's
    bucket: str
    prefix: str

    def versions(self, folder: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        start = f"{self.prefix}/{folder}/" if folder else f"{self.prefix}/"
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start):
            for entry in page.get("Contents", ()):
                found[entry["Key"].removeprefix(f"{self.prefix}/")] = entry["ETag"]
        return found

    def read(self, name: str) -> bytes | None:
        with suppress(self.client.exceptions.NoSuchKey):
            body = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"]
            data: bytes = body.read()
            return data
        return None

    def uploads(self) -> list[str]:
        answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [upload["Key"].removeprefix(f"{self.prefix}/") for upload in answer.get("Uploads", ())]


@dataclass(frozen=True)
class Expected:
    """The rows and error rows of a run that nobody disturbed, sorted by identity."""

    rows: pa.Table
    errors: pa.Table

    @staticmethod
    def of(config: dict[str, Any]) -> Expected:
        """What stands in the output of this config."""
        return Expected(_read(config, errors=False), _read(config, errors=True))

    @cached_property
    def listing(self) -> Counter[Identity]:
        return _identities(self.rows) + _identities(self.errors)

    @cached_property
    def parts(self) -> dict[str, pa.Table]:
        """By the name of their file."""
        shards = sorted({shard for shard, _ in self.listing})
        column = self.rows["shard"]
        return {
            f"data/{shard_id(shard)}.parquet": self.rows.filter(pa.compute.equal(column, shard)) for shard in shards
        }


def _read(config: dict[str, Any], errors: bool) -> pa.Table:
    table = pipeline.read(config["output"]["url"], errors=errors, config=make_config(config))
    return table.sort_by([("shard", "ascending"), ("index", "ascending")]).combine_chunks()


def _identities(table: pa.Table) -> Counter[Identity]:
    return Counter(zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True))


# --- When all is done ------------------------------------------------------------------------------------------------


def violations(config: dict[str, Any], place: Place, expected: Expected) -> list[str]:
    """Everything that is wrong with the dataset that this config writes; [] if it is as if nobody had disturbed it."""
    return [
        *_leftovers(place),
        *_unbelieved(config, expected),
        *_miscounted(config, expected),
        *(f"verify: {problem}" for problem in pipeline.verify(*_url_and_config(config)).problems),
    ]


def _url_and_config(config: dict[str, Any]) -> tuple[str, int, Any]:
    return config["output"]["url"], 0, make_config(config)


def _leftovers(place: Place) -> Iterator[str]:
    yield from (f"leftover: {name}" for name in place.versions() if not LAYOUT.fullmatch(name))
    yield from (f"unfinished multipart upload: {name}" for name in place.uploads())


def _unbelieved(config: dict[str, Any], expected: Expected) -> Iterator[str]:
    """One mark per shard, which vouches for what stands there."""
    dataset = Dataset(config["output"]["url"], Store(make_config(config).output_storage))
    standing = dataset.standing()
    wanted = {shard_id(shard) for shard, _ in expected.listing}
    yield from (f"part of no shard: {name}" for name in sorted(standing.keys() - wanted))
    for name in sorted(wanted):
        found = standing.get(name)
        if found is None:
            yield f"no part: {name}"
        elif len(found.marks) != 1:
            yield f"{len(found.marks)} marks: {name}"
        elif found.valid_mark is None:
            yield f"mark of other versions: {name}"


def _miscounted(config: dict[str, Any], expected: Expected) -> Iterator[str]:
    """Each listed sample once, with the values that it has without disturbance."""
    try:
        rows, errors = _read(config, errors=False), _read(config, errors=True)
    except Exception as cause:  # noqa: BLE001 - whatever a damaged dataset makes of reading
        yield f"cannot be read: {cause}"
        return
    found = _identities(rows) + _identities(errors)
    yield from _some("lost", sorted((expected.listing - found).elements()))
    yield from _some("doubled or unknown", sorted((found - expected.listing).elements()))
    if found == expected.listing:
        for what, have, want in (("row", rows, expected.rows), ("error row", errors, expected.errors)):
            yield from _some(f"other {what}", _differing(have, want))


def _differing(have: pa.Table, want: pa.Table) -> list[Identity]:
    if have.equals(want):
        return []
    if have.schema != want.schema:
        return [("schema", 0)]
    if have.num_rows != want.num_rows:
        return sorted(((_identities(have) - _identities(want)) + (_identities(want) - _identities(have))).elements())
    names = zip(want["shard"].to_pylist(), want["index"].to_pylist(), strict=True)
    return [name for place, name in enumerate(names) if not have.slice(place, 1).equals(want.slice(place, 1))]


def _some(what: str, identities: list[Identity]) -> Iterator[str]:
    for shard, index in identities[:NAMED]:
        yield f"{what}: {shard} index {index}"
    if len(identities) > NAMED:
        yield f"{what}: {len(identities) - NAMED} more"


# --- All the while ---------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    version: object
    identities: Counter[Identity]


@dataclass
class Reader:
    """Looks at `data/*.parquet` again and again: every file whole and right, no sample twice, none gone again.

    A file that did not change since the last look is not opened again.
    """

    place: Place
    expected: Expected
    every_s: float = LOOK_EVERY_S
    looks: int = 0
    problems: set[str] = field(default_factory=set)
    _parts: dict[str, _Part] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Reader:
        self._thread = threading.Thread(target=self._read_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read_on(self) -> None:
        while not self._over.wait(self.every_s):
            try:
                self.look()
            except Exception as cause:  # noqa: BLE001 - it is a finding, and must not end the reader
                self.problems.add(f"reader: {type(cause).__name__}: {cause}")

    def look(self) -> None:
        found = self.place.versions("data")
        versions = {name: version for name, version in found.items() if not _is_hidden(name)}
        self._report(f"{name} vanished" for name in self._parts.keys() - versions.keys())
        for name, version in versions.items():
            before = self._parts.get(name)
            if before is None or before.version != version:
                self._open(name, version)
        counts: Counter[Identity] = Counter()
        for part in self._parts.values():
            counts.update(part.identities)
        self._report(_some("twice", [identity for identity, count in counts.items() if count > 1]))
        self.looks += 1

    def _open(self, name: str, version: object) -> None:
        data = self.place.read(name)
        if data is None:
            self._report([f"{name} vanished"])
            return
        try:
            table = pq.read_table(pa.BufferReader(data)).replace_schema_metadata()
        except pa.ArrowException as cause:
            self._report([f"{name} is not whole: {cause}"])
            return
        if not table.equals(self.expected.parts.get(name)):
            self._report([f"{name} has other rows than its shard"])
        self._parts[name] = _Part(version, _identities(table))

    def _report(self, problems: Iterable[str]) -> None:
        self.problems.update(f"reader: {problem}" for problem in problems)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
