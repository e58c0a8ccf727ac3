"""What one reader makes of its share of a sample: images read and decoded, the time of it, and the bytes they take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import JobConfig, Transform
from pipeline.deaths import Guard, Notes
from pipeline.errors import PipelineError, clean
from pipeline.inputs.shards import Shard
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.inputs.tars import TAR_BUFFER
from pipeline.rows import PIXELS, Kind, Row
from pipeline.storage import Store
from pipeline.timing import Spent

log = logging.getLogger(__name__)

COUNTED_BYTES = 64 * 2**20  # of a reader's tars together, compressed or not, to know how many images they hold
MIN_COUNTED_BYTES = 4 * 2**20  # of each: some times what its reader reads at once
UNREADABLE = 20  # times as many images as are wanted are read where too few of them can be


@dataclass(frozen=True)
class Counts:
    """Of images."""

    read: int = 0
    unreadable: int = 0  # of these
    tried: int = 0  # to decode
    decoded: int = 0
    held: float = 0.0  # by the shards that tell, whether they were read or not
    num_bytes: int = 0  # of these shards

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Decoded:
    """What one reader made of its share of the sample."""

    counts: Counts
    spent: Spent
    block: pa.Table  # PIXELS


class _Kept(Notes):
    """Keeps what a guard tells."""

    def __init__(self) -> None:
        self.spent = Spent()

    def spend(self, spent: Spent) -> None:
        self.spent += spent


class _Observed(Store):
    """Knows the stream that it opened last."""

    opened: BinaryIO | None = None

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        self.opened = super().open(url, version, read_ahead)
        return self.opened

    @property
    def place(self) -> int:
        """How many bytes of it are read; 0 where it is closed, since the end will tell."""
        return 0 if self.opened is None or self.opened.closed else self.opened.tell()


@dataclass
class _Read:
    """How far a shard has been read."""

    shard: Shard
    images: int = 0
    unreadable: int = 0  # of these
    place: int = 0  # in its bytes
    last: Kind | None = None


def read_and_decode(
    shards: Sequence[Shard], config: JobConfig, transform: Transform, images: int, max_bytes: int
) -> Decoded:
    """The first images of these shards, about as many of each. None is decoded any more once the pixels exceed
    `max_bytes`. Tars are read on, to know how many images they hold: of shards that differ each counts by its size."""
    notes = _Kept()
    guard, store = Guard(notes, "sample"), _Observed(config.input_storage)
    reads = [_Read(shard) for shard in shards]
    counts = Counts()
    samples: list[pa.Table] = []

    def is_full() -> bool:
        num_bytes: int = sum(block.nbytes for block in samples)
        return num_bytes > max_bytes

    def rows() -> Iterator[Row]:
        for number, read in enumerate(reads):
            found = read_rows(number, read.shard, config.input, store, guard)
            yield from _first_images(found, read, store, max(images / len(shards), 1), len(shards), is_full)

    kinds = pa.array([Kind.SAMPLE, Kind.ENCODED], pa.uint8())
    for found in guard.watch(pixel_blocks(rows(), transform, config.input, images, guard)):
        samples.append(found.filter(pc.is_in(found["kind"], kinds)))
        counts += Counts(tried=found.num_rows, decoded=samples[-1].num_rows)
    for read in reads:  # not above, where the time of it would count
        held = _held(read, store)
        counts += Counts(read.images, read.unreadable)
        if held is not None and read.shard.size:  # which a web server need not tell
            counts += Counts(held=held, num_bytes=read.shard.size)
    return Decoded(counts, notes.spent, pa.concat_tables(samples) if samples else PIXELS.empty_table())


def _first_images(
    rows: Iterator[Row], read: _Read, store: _Observed, wanted: float, shards: int, is_full: Callable[[], bool]
) -> Iterator[Row]:
    """The first images of a shard, up to as many as are wanted and while it is not full. A tar, one of so many shards,
    is read on until it is known how many images it holds."""
    min_bytes = max(COUNTED_BYTES / shards, MIN_COUNTED_BYTES) if read.shard.kind == "webdataset" else 0.0
    taken = 0
    for row in rows:
        before, read.place, read.last = read.place, store.place, row.kind
        if row.kind not in (Kind.SAMPLE, Kind.ERROR):
            continue
        read.images += 1
        read.unreadable += row.kind is Kind.ERROR
        if row.kind is Kind.SAMPLE and taken < wanted and not is_full():
            taken += 1
            yield row
        is_known = not min_bytes or before != read.place >= min_bytes  # the reader has just filled its buffer
        if is_known and (taken >= wanted or read.images >= UNREADABLE * wanted or is_full()):
            return


def _held(read: _Read, store: Store) -> float | None:
    """How many images the shard holds, None if it doesn't tell."""
    if read.shard.kind == "files":
        return len(read.shard.members)
    if read.last is Kind.END:
        return read.images
    if read.last is Kind.ABANDONED or not read.images:
        return None
    if read.shard.kind == "parquet":
        return _rows_of(read.shard, store)
    # The reader holds one more image back, which ends somewhere in its buffer, last filled for it.
    images, least = read.images + 1, read.place - TAR_BUFFER
    return images * read.shard.size / (least + min(least / images, TAR_BUFFER) / 2)


def _rows_of(shard: Shard, store: Store) -> int | None:
    """Of a Parquet file; None where it cannot be read any more."""
    try:
        with store.open(shard.url, shard.version, read_ahead=False) as file:
            return int(pq.read_metadata(file).num_rows)
    except (PipelineError, pa.ArrowException, OSError) as cause:
        log.warning("%s does not tell how many rows it has: %s", shard.url, clean(cause))
        return None
