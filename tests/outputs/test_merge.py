"""Pieces become a part: sorted, complete, with the same bytes for the same rows."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.outputs import commit as commit_module
from pipeline.outputs.commit import describe
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.schema import Footer
from pipeline.rows import Columns, Kind
from pipeline.storage import Store
from tests.support.pieces import (
    BOTH,
    IDENTITY,
    LABELS,
    VECTORS,
    commit,
    embeddings,
    marker,
    new_dataset,
    piece,
    shard_id,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return new_dataset(tmp_path / "labels")


def part(dataset: Dataset, folder: str = "data", number: int = 0) -> Path:
    return Path(dataset.url, folder, f"{shard_id(number)}.parquet")


def snapshot(dataset: Dataset) -> dict[Path, tuple[bytes, int]]:
    """Every file with its content and the time of its writing."""
    files = [path for path in Path(dataset.url).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- What a block holds ----------------------------------------------------------------------------------------------


def test_a_block_is_described_shard_by_shard():
    rows = [
        piece(BOTH, 3, [5, 4], errors=[4]),
        marker(BOTH, 7, Kind.END, 9),
        piece(BOTH, 7, [8]),
        marker(BOTH, 9, Kind.ABANDONED, message="StoreUnavailable: down"),
    ]
    third, seventh, ninth = describe(pa.concat_tables(rows), "here")
    assert (third.shard, third.indices.tolist(), third.errors, third.end) == (3, [5, 4], 1, None)
    assert (seventh.shard, seventh.indices.tolist(), seventh.errors, seventh.end) == (7, [8], 0, 9)
    assert (ninth.shard, ninth.indices.tolist(), ninth.abandoned) == (9, [], "StoreUnavailable: down")
    assert third.piece == seventh.piece == "here"


def test_a_block_may_hold_the_ends_of_two_readings():
    block = pa.concat_tables([marker(BOTH, 1, Kind.END, 3), marker(BOTH, 1, Kind.END, 3), marker(BOTH, 1, Kind.END, 4)])
    assert [receipt.end for receipt in describe(block, None)] == [3, 4]


# --- Merging ---------------------------------------------------------------------------------------------------------

SIZE, FAILED = 40, frozenset({0, 3, 17, 18, 19, 39})
GROUP = 7


@st.composite
def partitions(draw: st.DrawFn) -> list[pa.Table]:
    """The rows of a shard in pieces that overlap, in any order, with markers and rows of other shards among them."""
    order = draw(st.permutations(range(SIZE)))
    cuts = sorted(draw(st.lists(st.integers(0, SIZE), max_size=4)))
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, SIZE], strict=True):
        again = draw(st.lists(st.integers(0, SIZE - 1), max_size=3))
        blocks = [piece(BOTH, 0, [*order[start:stop], *again], FAILED)]
        if draw(st.booleans()):
            others = draw(st.lists(st.integers(0, SIZE + 9), max_size=3, unique=True))
            blocks.insert(draw(st.integers(0, 1)), piece(BOTH, 1, others))
        if draw(st.booleans()):
            blocks.append(marker(BOTH, 0, Kind.END, SIZE))
        pieces.append(pa.concat_tables(blocks))
    return draw(st.permutations(pieces))


def written(folder: Path, pieces: list[pa.Table]) -> tuple[bytes, bytes]:
    """The bytes of the part and the errors part, written with small row groups."""
    dataset = new_dataset(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit_module, "ROWS_PER_GROUP", GROUP)
        commit(dataset, pieces, SIZE)
    return part(dataset).read_bytes(), part(dataset, "errors").read_bytes()


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return written(tmp_path_factory.mktemp("in order"), [piece(BOTH, 0, range(SIZE), FAILED)])


@settings(max_examples=60)
@given(pieces=partitions())
def test_a_part_depends_on_its_rows_alone(
    pieces: list[pa.Table], in_order: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
):
    assert written(tmp_path_factory.mktemp("pieces"), pieces) == in_order


def test_a_large_part_depends_on_its_rows_alone_too(tmp_path: Path):
    """Pages and dictionaries end where rows do, not where pieces did."""
    wide = replace(BOTH, embedding_dim=512)
    size = 3000
    whole = piece(wide, 0, range(size), errors=range(0, size, 7))
    pieces = [whole.slice(start, 130) for start in range(0, size, 130)]
    found = set[bytes]()
    for name, content in {
        "whole": [whole],
        "pieces": pieces,
        "backwards": pieces[::-1],
        "alone": [whole.take(np.arange(size)[::-1])],
    }.items():
        dataset = new_dataset(tmp_path / name)
        commit(dataset, content, size, wide)
        found.add(part(dataset).read_bytes() + part(dataset, "errors").read_bytes())
    assert len(found) == 1


def test_rows_stand_in_order_of_their_index_and_error_rows_apart(in_order: tuple[bytes, bytes]):
    rows, errors = (pq.read_table(pa.BufferReader(data)) for data in in_order)
    good = [index for index in range(SIZE) if index not in FAILED]
    assert rows["index"].to_pylist() == good
    assert rows["key"].to_pylist() == [f"0/0/{index}" for index in good]
    assert set(rows["shard"].to_pylist()) == {"file:///in/0.tar"}
    assert rows["label"].to_pylist() == [("cat", "dog")[index % 2] for index in good]
    vectors = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    assert np.array_equal(vectors, embeddings(np.array(good), BOTH))
    assert errors.to_pylist()[1] == {
        "key": "0/0/3",
        "shard": "file:///in/0.tar",
        "index": 3,
        "stage": "decode",
        "error": "corrupt",
        "message": "broken beyond repair",
        "bytes_sha256": "ab" * 32,
        "num_bytes": 7,
    }
    assert errors["index"].to_pylist() == sorted(FAILED)
    assert pq.ParquetFile(pa.BufferReader(in_order[0])).num_row_groups == -(-len(good) // GROUP)


def test_a_missing_index_is_an_error_and_writes_nothing(dataset: Dataset):
    before = snapshot(dataset)
    with pytest.raises(PipelineError, match=r"0\.tar: no piece has index 2 \(2 missing\)"):
        commit(dataset, [piece(BOTH, 0, [0, 1, 4])], 5)
    assert snapshot(dataset) == before


@pytest.mark.parametrize("columns", [BOTH, LABELS, VECTORS], ids=["both", "labels only", "embeddings only"])
def test_the_schema_is_exactly_the_documented_one(dataset: Dataset, columns: Columns):
    commit(dataset, [piece(columns, 0, range(3), errors=[1])], 3, columns)
    top = pa.struct([("class_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())])
    labels = [("class_id", pa.int32()), ("label", pa.string()), ("score", pa.float32()), ("top_k", pa.list_(top))]
    vector = pa.float16() if columns.embedding_dtype == "float16" else pa.float32()
    expected = [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        *(labels if columns.top_k else []),
        *([("embedding", pa.list_(vector, 4))] if columns.embedding_dtype else []),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
    assert pq.read_schema(part(dataset)).remove_metadata() == pa.schema(expected)
    assert pq.read_schema(part(dataset, "errors")).remove_metadata() == pa.schema(
        [
            *((name, pa.string()) for name in ("key", "shard")),
            ("index", pa.int64()),
            *((name, pa.string()) for name in ("stage", "error", "message", "bytes_sha256")),
            ("num_bytes", pa.int64()),
        ]
    )
    assert pq.read_table(part(dataset)).column("key").null_count == 0


def test_each_part_says_what_it_is(dataset: Dataset):
    committed = commit(dataset, [piece(BOTH, 0, range(5), errors=[1])], 5)
    expected = Footer("file:///in/0.tar", "1" * 16, IDENTITY["model_fingerprint"], "eager", 5, 4, 1)
    for folder in ("data", "errors"):
        schema = pq.read_schema(part(dataset, folder))
        assert Footer.of(schema) == expected
        assert schema.metadata[b"resnet_batch.format_version"] == b"1"
    (mark,) = dataset.standing()[shard_id(0)].marks
    assert dataset.read_mark(mark) == expected.body()
    assert (committed.predicted, committed.errors, committed.num_bytes) == (4, 1, part(dataset).stat().st_size)


def test_a_shard_without_samples_is_an_empty_part(dataset: Dataset):
    commit(dataset, [], 0)
    table = pq.read_table(part(dataset))
    assert table.num_rows == 0
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 4)
    assert not part(dataset, "errors").exists()
    assert dataset.standing()[shard_id(0)].fingerprint == "1" * 16


def test_a_shard_of_error_rows_only_is_an_empty_part_and_an_errors_part(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3), errors=range(3))], 3)
    assert pq.read_table(part(dataset)).num_rows == 0
    assert pq.read_table(part(dataset, "errors")).num_rows == 3


PEAK = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from pipeline.rows import Columns
    from tests.support.pieces import commit, new_dataset, piece

    columns = Columns(0, "float16", 512)
    rows, count = 1024, int(sys.argv[2])

    class Pieces:  # made when they are fetched, as Ray reads them from its store
        def __len__(self):
            return count
        def __getitem__(self, number):
            start = (number * 37 % count) * rows
            return piece(columns, 0, np.arange(start, start + rows))

    commit(new_dataset(Path(sys.argv[1])), Pieces(), rows * count, columns)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_shard(tmp_path: Path):
    def merging(pieces: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / str(pieces)), str(pieces)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    small, large = (int(process.communicate()[0]) for process in [merging(41), merging(161)])
    assert part(Dataset(str(tmp_path / "161"), Store())).stat().st_size > 160 * 2**20
    assert large - small < 25, f"{small} MB for 41 MB of rows, {large} MB for 161 MB"
