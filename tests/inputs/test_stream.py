"""Blocks: what a worker makes of shards, whether it decodes where it reads or elsewhere."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Input, Transform
from pipeline.errors import Reject, StoreUnavailable
from pipeline.inputs import stream
from pipeline.inputs.images import decode
from pipeline.inputs.shards import discover
from pipeline.inputs.stream import pixel_blocks, read_rows, rows_of, sample_blocks
from pipeline.rows import PIXELS, SAMPLES, Kind, Row
from pipeline.storage import Store
from tests.support.tars import tar

CONFIG = Input(url="unused")
SQUARE = Transform(resize=8, crop=8)
WHOLE = Transform(resize=None, crop=None)


def png(width: int, height: int, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def sample(index: int, data: bytes = b"", shard: int = 0) -> Row:
    return Row(shard, Kind.SAMPLE, index, f"key-{index}", data or png(20, 10, index))


def identities(block: pa.Table) -> list[tuple[int, int, int]]:
    return list(zip(*(block[name].to_pylist() for name in ("shard", "kind", "index")), strict=True))


def images_in(block: pa.Table) -> int:
    return block["kind"].to_pylist().count(Kind.SAMPLE)


# --- Rows of a shard -----------------------------------------------------------------------------------------------


def rows_from(path: Path, store: Store | None = None) -> list[Row]:
    config = Input(url=str(path), format="webdataset")
    (shard,) = discover(config, Store())
    return list(read_rows(7, shard, config, store or Store()))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(tar(("a.jpg", b"A"), ("b.jpg", b"B" * 2000), ("c.jpg", b"")))
    return path


def test_rows_of_a_shard_end_with_their_number(shard: Path) -> None:
    assert rows_from(shard) == [
        Row(7, Kind.SAMPLE, 0, "a", b"A"),
        Row(7, Kind.SAMPLE, 1, "b", b"B" * 2000),
        Row(7, Kind.SAMPLE, 2, "c", b""),
        Row(7, Kind.END, 3),
    ]


def test_error_rows_count(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:3000])  # in the data of b
    first, damage, end = rows_from(shard)
    assert (first.key, damage.kind, damage.index, damage.key, damage.data) == ("a", Kind.ERROR, 1, None, None)
    assert damage.reject is not None
    assert (damage.reject.stage, damage.reject.error) == ("read", "truncated_shard")
    assert (end.kind, end.index) == (Kind.END, 2)


def test_shard_without_images_ends_and_is_mentioned(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard.write_bytes(tar(("readme.txt", b"hello")))
    with caplog.at_level(logging.WARNING):
        assert rows_from(shard) == [Row(7, Kind.END, 0)]
    assert "holds no images" in caplog.text


class FailingStore(Store):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        raise self.error


@pytest.mark.parametrize(
    "error", [StoreUnavailable("s3://b/\udcff.tar is down"), RuntimeError("nobody foresaw \udcff")]
)
def test_what_fails_is_a_marker_and_never_an_exception(shard: Path, error: Exception) -> None:
    (row,) = rows_from(shard, FailingStore(error))
    assert (row.kind, row.shard, row.index) == (Kind.ABANDONED, 7, 0)
    assert row.reject is not None
    assert row.reject.error == type(error).__name__
    (block,) = pixel_blocks([row], SQUARE, CONFIG, 4)
    assert block["message"].to_pylist() == [str(error).replace("\udcff", r"\udcff")]


def test_source_that_changed_is_a_marker(shard: Path) -> None:
    config = Input(url=str(shard))
    (planned,) = discover(config, Store())
    shard.write_bytes(shard.read_bytes() + bytes(512))
    (row,) = read_rows(0, planned, config, Store())
    assert row.kind is Kind.ABANDONED
    assert row.reject is not None
    assert row.reject.error == "SourceChanged"


# --- Samples that are decoded elsewhere ----------------------------------------------------------------------------

texts = st.text(max_size=5)
rejects = st.builds(Reject, texts, texts, texts)
any_row = st.one_of(
    st.builds(Row, st.integers(0, 9), st.just(Kind.SAMPLE), st.integers(0, 2**40), texts, st.binary(max_size=50)),
    st.builds(
        Row,
        st.integers(0, 9),
        st.just(Kind.ERROR),
        st.integers(0, 2**40),
        st.none() | texts,
        st.none() | st.binary(max_size=50),
        rejects,
    ),
    st.builds(Row, st.integers(0, 9), st.just(Kind.END), st.integers(0, 2**40)),
    st.builds(Row, st.integers(0, 9), st.just(Kind.ABANDONED), st.just(0), reject=rejects),
)


def as_tuples(rows: Iterator[Row] | list[Row]) -> list[tuple[Any, ...]]:
    """Rejects are exceptions, which are equal to themselves only."""
    return [(r.shard, r.kind, r.index, r.key, r.data, r.reject and r.reject.args) for r in rows]


@given(st.lists(any_row, max_size=20), st.integers(1, 6))
def test_rows_survive_the_journey_through_sample_blocks(rows: list[Row], rows_per_block: int) -> None:
    blocks = list(sample_blocks(rows, rows_per_block))
    assert all(block.schema.equals(SAMPLES) for block in blocks)
    assert [block.num_rows for block in blocks[:-1]] == [rows_per_block] * (len(blocks) - 1)
    assert as_tuples([row for block in blocks for row in rows_of(block)]) == as_tuples(rows)


def test_sample_blocks_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BLOCK_BYTES", 1000)
    blocks = list(sample_blocks([sample(n, bytes(400)) for n in range(7)], 100))
    assert [block.num_rows for block in blocks] == [3, 3, 1]


def test_decoding_elsewhere_gives_the_same_rows(tmp_path: Path) -> None:
    members = [(f"{n}.png", png(20, 10, n)) for n in range(10)]
    members[3:5] = [("3.jpg", b"no image"), ("4.jpg", b"")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar(*members)[:-1024])
    here = pa.concat_tables(pixel_blocks(rows_from(path), SQUARE, CONFIG, 4))
    there = pa.concat_tables(
        pixels
        for block in sample_blocks(rows_from(path), 3)
        for pixels in pixel_blocks(rows_of(block), SQUARE, CONFIG, 4)
    )
    order = [("kind", "ascending"), ("index", "ascending")]
    assert here.sort_by(order).equals(there.sort_by(order))


# --- Blocks of pixels ----------------------------------------------------------------------------------------------


def test_blocks_are_full_and_run_across_shards() -> None:
    rows = [row for shard in range(5) for row in (*(sample(n, shard=shard) for n in range(3)), Row(shard, Kind.END, 3))]
    blocks = list(pixel_blocks(rows, SQUARE, CONFIG, 4))
    assert [images_in(block) for block in blocks] == [4, 4, 4, 3]
    for block in blocks:
        assert block.schema.equals(PIXELS)
        kinds = block["kind"].to_pylist()
        assert kinds == sorted(kinds), "error rows and markers stand behind the images"
    assert sorted(i for block in blocks for i in identities(block)) == sorted((r.shard, r.kind, r.index) for r in rows)


@pytest.mark.parametrize("transform", [SQUARE, WHOLE], ids=["one size", "own sizes"])
def test_pixels_are_those_of_their_images(transform: Transform) -> None:
    rows = [sample(n, png(3 + n, 20 - n, n)) for n in range(10)]
    rows.insert(5, sample(99, b"no image"))
    expected = {row.index: decode(row.data or b"", transform, CONFIG.max_pixels) for row in rows if row.index != 99}
    got = {}
    for block in pixel_blocks(rows, transform, CONFIG, 4):
        for row in block.to_pylist():
            if row["kind"] == Kind.SAMPLE:
                shape = (row["pixel_height"], row["pixel_width"], 3)
                got[row["index"]] = np.frombuffer(row["pixels"], np.uint8).reshape(shape)
                pixels = expected[row["index"]]
                assert (row["key"], row["width"], row["height"]) == (f"key-{row['index']}", pixels.width, pixels.height)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[index], pixels.array) for index, pixels in expected.items())


def test_error_rows_tell_their_bytes_as_far_as_they_are_known() -> None:
    rows = [
        sample(0, b"no image"),
        Row(0, Kind.SAMPLE, 1, "empty", b""),
        Row(0, Kind.ERROR, 2, None, reject=Reject("read", "truncated_shard", "cut")),
        Row(0, Kind.END, 3),
    ]
    (block,) = pixel_blocks(rows, SQUARE, CONFIG, 4)
    columns = ("kind", "stage", "error", "num_bytes", "bytes_sha256")
    found = list(zip(*(block[name].to_pylist() for name in columns), strict=True))
    assert found == [
        (Kind.ERROR, "decode", "not_an_image", 8, hashlib.sha256(b"no image").hexdigest()),
        (Kind.ERROR, "decode", "empty", 0, hashlib.sha256(b"").hexdigest()),
        (Kind.ERROR, "read", "truncated_shard", None, None),
        (Kind.END, None, None, None, None),
    ]
    assert all(block[name].null_count == 4 for name in ("width", "height", "pixel_width", "pixel_height"))
    assert block["pixels"].to_pylist() == [b""] * 4


def test_images_of_their_own_sizes_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BLOCK_BYTES", 10_000)
    sides = [10, 50, 50, 100, 10, 10]  # 300, 7,500, 7,500, 30,000, 300 and 300 bytes
    blocks = list(pixel_blocks([sample(n, png(s, s)) for n, s in enumerate(sides)], WHOLE, CONFIG, 100))
    assert [images_in(block) for block in blocks] == [3, 1, 2]
    assert all(block["pixels"].nbytes <= 10_000 + 30_000 + 100 for block in blocks)


def test_images_of_one_size_fill_their_blocks_however_large_these_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is given full batches; how many images these have is settled by its memory."""
    monkeypatch.setattr(stream, "MAX_BLOCK_BYTES", 1000)
    blocks = list(pixel_blocks([sample(n) for n in range(20)], SQUARE, CONFIG, 8))
    assert [images_in(block) for block in blocks] == [8, 8, 4]
    assert blocks[0]["pixels"].nbytes > 1000


class Counting:
    """Rows, and how many of them were taken."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.taken = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.taken += 1
            yield row


def test_error_rows_and_their_bytes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of nothing but broken images, beside one image that waits for others."""
    monkeypatch.setattr(stream, "MAX_BLOCK_BYTES", 10_000)
    rows = Counting([sample(0), *(sample(n, b"broken" + bytes(994)) for n in range(1, 101)), sample(101)])
    seen = 0
    blocks = []
    for block in pixel_blocks(rows, SQUARE, CONFIG, 2):
        blocks.append(block)
        assert rows.taken - seen <= 12
        seen = rows.taken
    assert [images_in(block) for block in blocks] == [0] * 10 + [2], "the image waited for a full block"
    assert sum(block.num_rows for block in blocks) == 102


def test_markers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BLOCK_MARKERS", 10)
    blocks = list(pixel_blocks([Row(n, Kind.END, 0) for n in range(25)], SQUARE, CONFIG, 4))
    assert [block.num_rows for block in blocks] == [10, 10, 5]


def test_nothing_gives_no_blocks() -> None:
    assert list(pixel_blocks([], SQUARE, CONFIG, 4)) == []
    assert list(sample_blocks([], 4)) == []


def test_blocks_weigh_what_they_hold() -> None:
    """A block of few images must not drag the room for many along."""
    (block,) = pixel_blocks([sample(0)], SQUARE, CONFIG, 1000)
    assert block["pixels"].nbytes < 1000
    assert len(pickle.dumps(block)) < 5000
