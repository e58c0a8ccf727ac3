"""Shards to rows to blocks of pixels: what a CPU worker does, without torch and without knowing of Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.config import Input, Transform
from pipeline.errors import PipelineError, Reject
from pipeline.inputs.images import Pixels, decode
from pipeline.inputs.readers import read
from pipeline.inputs.shards import Shard
from pipeline.rows import PIXELS, SAMPLES, Kind, Row, identity_and_verdict
from pipeline.storage import Store

log = logging.getLogger(__name__)

MAX_BLOCK_BYTES = 64 * 2**20  # of pixels, where images keep their own size
MAX_BLOCK_MARKERS = 4096


def read_rows(number: int, shard: Shard, config: Input, store: Store) -> Iterator[Row]:
    """The rows of the `number`-th shard of the plan: its samples and error rows, then one END or ABANDONED.

    A store that fails does not raise here, since an exception in a task would end the whole run.
    """
    count = 0
    try:
        for sample in read(shard, config, store):
            if sample.reject is None:
                yield Row(number, Kind.SAMPLE, sample.index, sample.key, sample.data)
            else:
                yield Row(number, Kind.ERROR, sample.index, sample.key, reject=sample.reject)
            count += 1
    except PipelineError as error:
        log.warning("shard %s stays open: %s", shard.url, error)
        yield Row(number, Kind.ABANDONED, 0, reject=Reject("read", type(error).__name__, str(error)))
    else:
        yield Row(number, Kind.END, count)


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
    """The rows of a SAMPLES table."""
    for item in block.to_pylist():
        reject = Reject(item["stage"], item["error"], item["message"]) if item["error"] is not None else None
        yield Row(item["shard"], Kind(item["kind"]), item["index"], item["key"], item["data"], reject)


def pixel_blocks(rows: Iterable[Row], transform: Transform, config: Input, rows_per_block: int) -> Iterator[pa.Table]:
    """Decode samples into PIXELS tables of `rows_per_block` images each, error rows and markers behind them.

    Blocks run across shards, so that the device always gets full batches.
    """
    images: list[tuple[Row, Pixels]] = []
    others: list[Row] = []
    size = 0
    for row in rows:
        if row.kind is not Kind.SAMPLE:
            others.append(row)
        else:
            try:
                assert row.data is not None, "a sample has bytes"
                pixels = decode(row.data, transform, config.max_pixels)
            except Reject as reject:
                others.append(row.rejected(reject))
            else:
                row.data = None
                images.append((row, pixels))
                size += pixels.array.nbytes
        if len(images) >= rows_per_block or size >= MAX_BLOCK_BYTES or len(others) >= MAX_BLOCK_MARKERS:
            yield _pixels_table(images, others)
            images, others, size = [], [], 0
    if images or others:
        yield _pixels_table(images, others)


def _pixels_table(images: list[tuple[Row, Pixels]], others: list[Row]) -> pa.Table:
    arrays = [pixels.array for _, pixels in images]
    missing = [None] * len(others)
    columns = identity_and_verdict([row for row, _ in images] + others)
    columns["width"] = pa.array([p.width for _, p in images] + missing, pa.int32())
    columns["height"] = pa.array([p.height for _, p in images] + missing, pa.int32())
    columns["pixel_height"] = pa.array([a.shape[0] for a in arrays] + missing, pa.int32())
    columns["pixel_width"] = pa.array([a.shape[1] for a in arrays] + missing, pa.int32())
    columns["pixels"] = _joined(arrays, len(others))
    return pa.table(columns, schema=PIXELS)


def _joined(arrays: list[np.ndarray], empty: int) -> pa.Array:
    """One large_binary column over one buffer, with `empty` values of no bytes at its end."""
    offsets = np.zeros(len(arrays) + empty + 1, np.int64)
    np.cumsum([a.nbytes for a in arrays], out=offsets[1 : len(arrays) + 1])
    offsets[len(arrays) + 1 :] = offsets[len(arrays)]
    flat = np.concatenate([a.reshape(-1) for a in arrays]) if arrays else np.empty(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.large_binary(), len(arrays) + empty, buffers)
