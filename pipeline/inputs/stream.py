"""Shards to rows to blocks of pixels: what a CPU worker does, without torch and without knowing of Ray."""

from __future__ import annotations

import itertools
import logging
import math
import traceback
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.config import Input, Transform
from pipeline.deaths import Guard
from pipeline.errors import PipelineError, Reject, redact
from pipeline.inputs.images import Pixels, decode, encoded
from pipeline.inputs.readers import read
from pipeline.inputs.shards import Shard, printable
from pipeline.rows import PIXELS, SAMPLES, Kind, Row, identity_and_verdict
from pipeline.storage import Store

log = logging.getLogger(__name__)

MAX_BLOCK_BYTES = 64 * 2**20  # of pixels, where images keep their own size
MAX_BLOCK_MARKERS = 4096


def read_rows(number: int, shard: Shard, config: Input, store: Store, guard: Guard | None = None) -> Iterator[Row]:
    """The rows of the `number`-th shard of the plan: its samples and error rows, then one END or ABANDONED.

    Never raises, since an exception in a task would end the whole run: not for a store that fails, and not for
    what nobody foresaw either. Where reading on kills the process, one error row stands for the rest of the shard.
    """
    count = 0
    try:
        for row in _guarded(read(shard, config, store, number), number, guard or Guard()):
            yield row
            count += 1
    except PipelineError as error:
        log.warning("shard %s stays open: %s", shard.url, error)
        yield _abandoned(number, error)
    except Exception as error:  # noqa: BLE001 - one shard must not keep the others from being done
        log.error("shard %s stays open\n%s", redact(shard.url), redact(traceback.format_exc()))
        yield _abandoned(number, error)
    else:
        if count == 0:
            log.warning("shard %s holds no images", shard.url)
        yield Row(number, Kind.END, count)


def _guarded(rows: Iterator[Row], number: int, guard: Guard) -> Iterator[Row]:
    """The rows up to where reading on kills the process; then an error row."""
    for index in itertools.count():
        try:
            guard.check("read", number, index)
        except Reject as reject:
            yield Row(number, Kind.ERROR, index, reject=reject)
            return
        row = next(rows, None)
        if row is None:
            return
        yield row


def _abandoned(number: int, error: Exception) -> Row:
    return Row(number, Kind.ABANDONED, 0, reject=Reject("read", type(error).__name__, printable(redact(str(error)))))


def sample_blocks(rows: Iterable[Row], rows_per_block: int) -> Iterator[pa.Table]:
    """Rows as SAMPLES tables, for decoding elsewhere."""
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row.data or b"")
        if len(block) >= rows_per_block or size >= MAX_BLOCK_BYTES:
            yield _samples_table(block)
            block, size = [], 0
    if block:
        yield _samples_table(block)


def _samples_table(rows: list[Row]) -> pa.Table:
    data = pa.array([row.data for row in rows], pa.large_binary())
    return pa.table({**identity_and_verdict(rows), "data": data}, schema=SAMPLES)


def rows_of(block: pa.Table) -> Iterator[Row]:
    """The rows of a SAMPLES table; their bytes are copied out one row at a time."""
    for item, data in zip(block.drop_columns("data").to_pylist(), block["data"], strict=True):
        reject = Reject(item["stage"], item["error"], item["message"]) if item["error"] is not None else None
        yield Row(item["shard"], Kind(item["kind"]), item["index"], item["key"], data.as_py(), reject)


def pixel_blocks(
    rows: Iterable[Row], transform: Transform, config: Input, rows_per_block: int, guard: Guard | None = None
) -> Iterator[pa.Table]:
    """Decode samples into PIXELS tables of `rows_per_block` images each, error rows and markers behind them.

    Blocks run across shards, so that the device always gets full batches. Only where images keep their own size, or
    stay encoded, do blocks hold fewer, lest they exceed MAX_BLOCK_BYTES by more than one image. Error rows and markers
    that have become many, or whose bytes have, leave without images.
    """
    guard = guard or Guard()
    limit = MAX_BLOCK_BYTES if transform.crop is None or transform.decode == "nvjpeg" else math.inf
    images = _Images(rows_per_block)
    others: list[Row] = []
    other_bytes = 0
    for row in rows:
        decoded = _decoded(row, transform, config, guard)
        if isinstance(decoded, Row):
            others.append(decoded)
            other_bytes += len(decoded.data or b"")
        else:
            images.add(row, decoded)
        if len(images.rows) >= rows_per_block or images.num_bytes >= limit:
            yield _pixels_table(images, others)
            images, others, other_bytes = _Images(rows_per_block), [], 0
        elif len(others) >= MAX_BLOCK_MARKERS or other_bytes >= MAX_BLOCK_BYTES:
            yield _pixels_table(_Images(0), others)
            others, other_bytes = [], 0
    if images.rows or others:
        yield _pixels_table(images, others)


def _decoded(row: Row, transform: Transform, config: Input, guard: Guard) -> Pixels | Row:
    """A sample's pixels, its bytes let go; or the row that takes their place, or has none."""
    if row.kind is not Kind.SAMPLE:
        return row
    assert row.data is not None, "a sample has bytes"
    try:
        guard.check("decode", row.shard, row.index)
        pixels = encoded(row.data, transform, config.max_pixels) if transform.decode == "nvjpeg" else None
        if pixels is not None:
            row.kind = Kind.ENCODED
        else:
            pixels = decode(row.data, transform, config.max_pixels)
    except Reject as reject:
        return row.rejected(reject)
    row.data = None
    return pixels


class _Images:
    """The images of one block, their pixels one behind the other in memory that the block takes over.

    Each is copied once and at once, while it is in the processor's cache, into memory from Arrow's pool, which
    keeps its pages from block to block: joining arrays at the end cost 3 % of decoding.
    """

    def __init__(self, capacity: int) -> None:
        self.rows: list[Row] = []
        self.sizes: list[tuple[int, int, int, int]] = []  # width, height, pixel_height, pixel_width
        self._capacity = capacity
        self._ends = [0]
        self._memory: pa.ResizableBuffer | None = None

    @property
    def num_bytes(self) -> int:
        return self._ends[-1]

    def add(self, row: Row, pixels: Pixels) -> None:
        array = pixels.array
        start, end = self.num_bytes, self.num_bytes + array.nbytes
        if self._memory is None:
            room = min(self._capacity * array.nbytes, MAX_BLOCK_BYTES)  # where all have that size, more may come
            self._memory = pa.allocate_buffer(max(room, end), resizable=True)
        elif end > self._memory.size:
            self._memory.resize(max(end, 2 * start))
        np.frombuffer(self._memory, np.uint8, array.nbytes, start)[:] = array.reshape(-1)
        self._ends.append(end)
        self.rows.append(row)
        self.sizes.append((pixels.width, pixels.height, *array.shape[:2]))

    def pixels(self, empty: int) -> pa.Array:
        """All as one large_binary column, with `empty` values of no bytes at its end."""
        offsets = np.array(self._ends + empty * self._ends[-1:], np.int64)
        memory = pa.py_buffer(b"") if self._memory is None else self._memory.slice(0, self.num_bytes)
        return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), memory])


def pixels_table(found: Sequence[tuple[Row, Pixels | Reject]]) -> pa.Table:
    """A PIXELS table of samples that were decoded elsewhere, or could not be."""
    images, others = _Images(len(found)), []
    for row, what in found:
        if isinstance(what, Reject):
            others.append(row.rejected(what))
        else:
            images.add(row, what)
    return _pixels_table(images, others)


def _pixels_table(images: _Images, others: list[Row]) -> pa.Table:
    columns = identity_and_verdict(images.rows + others)
    sizes = np.array(images.sizes, np.int32).reshape(-1, 4).T
    for name, values in zip(("width", "height", "pixel_height", "pixel_width"), sizes, strict=True):
        columns[name] = pa.concat_arrays([pa.array(values), pa.nulls(len(others), pa.int32())])
    columns["pixels"] = images.pixels(empty=len(others))
    return pa.table(columns, schema=PIXELS)
