"""What one reader makes of its share of a sample: images read and decoded, the time of it, and the bytes they take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
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

COUNTED_BYTES = 32 * 2**20  # of a tar, compressed or not


@dataclass(frozen=True)
class Counts:
    """Of images."""

    read: int = 0
    tried: int = 0  # to decode
    decoded: int = 0
    measured: int = 0  # whose bytes in their shards are known, whether they were read or not
    num_bytes: int = 0  # of these

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

    opened: BinaryIO

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        self.opened = super().open(url, version, read_ahead)
        return self.opened

    def is_read_to(self, place: int) -> bool:
        return self.opened.closed or self.opened.tell() >= place


def read_and_decode(
    shards: Sequence[Shard], config: JobConfig, transform: Transform, images: int, max_bytes: int
) -> Decoded:
    """The first images of these shards, about as many of each. None is decoded any more once the pixels exceed
    `max_bytes`. The first tar that has images is read on, to know how many bytes they take of it."""
    notes = _Kept()
    guard, store = Guard(notes, "sample"), _Observed(config.input_storage)
    counts = Counts()
    samples: list[pa.Table] = []

    def is_full() -> bool:
        num_bytes: int = sum(block.nbytes for block in samples)
        return num_bytes > max_bytes

    def rows() -> Iterator[Row]:
        nonlocal counts
        for number, shard in enumerate(shards):
            if is_full():
                return
            min_bytes = COUNTED_BYTES if shard.kind == "webdataset" and not counts.measured else 0
            found = read_rows(number, shard, config.input, store, guard)
            read, last = yield from _first_images(found, images / len(shards), is_full, min_bytes, store)
            counts += Counts(read) + _measured(shard, read, last, store)

    kinds = pa.array([Kind.SAMPLE, Kind.ENCODED], pa.uint8())
    for found in guard.watch(pixel_blocks(rows(), transform, config.input, images, guard)):
        samples.append(found.filter(pc.is_in(found["kind"], kinds)))
        counts += Counts(tried=found.num_rows, decoded=samples[-1].num_rows)
    for shard in shards:
        if shard.kind == "parquet" and not counts.measured:  # not read to its end
            counts += _of_footer(shard, store)
    return Decoded(counts, notes.spent, pa.concat_tables(samples) if samples else PIXELS.empty_table())


def _first_images(
    rows: Iterator[Row], wanted: float, is_full: Callable[[], bool], min_bytes: int, store: _Observed
) -> Generator[Row, None, tuple[int, Kind | None]]:
    """The first images of a shard, up to as many as are wanted and while it is not full. Reads on until `min_bytes` of
    the shard are read. Returns how many it read, and what kind of row came last."""
    read = 0
    last: Kind | None = None
    for row in rows:
        last = row.kind
        if row.kind is not Kind.SAMPLE:
            continue
        read += 1
        if read <= wanted and not is_full():
            yield row
        if (read >= wanted or is_full()) and (not min_bytes or store.is_read_to(min_bytes)):
            break
    return read, last


def _measured(shard: Shard, read: int, last: Kind | None, store: _Observed) -> Counts:
    """What the shard tells, of which so many images were read, of how many bytes they take."""
    if shard.kind == "files":
        return Counts(measured=len(shard.members), num_bytes=shard.size)
    if last is Kind.END or (last is Kind.SAMPLE and store.opened.closed):  # behind its last image
        return Counts(measured=read, num_bytes=shard.size)
    if last is Kind.SAMPLE and shard.kind == "webdataset" and store.is_read_to(COUNTED_BYTES):
        # The reader holds one image back, and has just filled its buffer.
        return Counts(measured=read + 1, num_bytes=store.opened.tell() - TAR_BUFFER)
    return Counts()


def _of_footer(shard: Shard, store: Store) -> Counts:
    """Of a Parquet file; nothing where it cannot be read any more."""
    try:
        with store.open(shard.url, shard.version, read_ahead=False) as file:
            return Counts(measured=pq.read_metadata(file).num_rows, num_bytes=shard.size)
    except (PipelineError, pa.ArrowException, OSError) as cause:
        log.warning("%s does not tell how many rows it has: %s", shard.url, clean(cause))
        return Counts()
