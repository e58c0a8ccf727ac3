"""What is read from Parquet, whole or damaged."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.inputs.reading import found, parquet, samples

JPEGS = [b"first", b"second one", b""]
PATHS = ["x/1.jpg", None, "3.jpg"]
TENSOR = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.int32(), [2]), pa.array([[1, 2]], pa.list_(pa.int32(), 2))
)


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int8(), pa.large_binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("as_arrow", [True, False])
def test_columns_of_bytes(tmp_path: Path, kind: pa.DataType, as_arrow: bool) -> None:
    values = pa.array([*JPEGS, None, *JPEGS], pa.binary())
    values = values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)
    path = parquet(tmp_path, {"label": list(range(7)), "image": values}, store_schema=as_arrow)
    names = list(enumerate([*JPEGS, "null_image", *JPEGS]))
    assert found(path) == [(str(row), content) for row, content in names]


def test_fixed_size_bytes_count_where_there_is_nothing_else_or_they_are_named(tmp_path: Path) -> None:
    hashes = pa.array([b"12", b"34"], pa.binary(2))
    path = parquet(tmp_path, {"hash": hashes})
    assert found(path) == [("0", b"12"), ("1", b"34")]
    path = parquet(tmp_path, {"hash": hashes, "image": [b"a", b"b"]})
    assert found(path) == [("0", b"a"), ("1", b"b")]
    assert found(path, image="hash") == [("0", b"12"), ("1", b"34")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_struct_of_bytes_and_path(tmp_path: Path, kind: pa.DataType) -> None:
    structs = [{"bytes": data, "path": path, "more": 1} for data, path in zip(JPEGS, PATHS, strict=True)]
    image = pa.array([*structs, None], pa.struct({"path": pa.string(), "bytes": kind, "more": pa.int8()}))
    path = parquet(tmp_path, {"image": image, "label": [0, 1, 2, 3]})
    assert found(path) == [("x/1.jpg", b"first"), ("1", b"second one"), ("3.jpg", b""), ("3", "null_image")]


def test_struct_without_path(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"image": pa.array([{"bytes": b"1"}], pa.struct({"bytes": pa.binary()}))})
    assert found(path) == [("0", b"1")]


def test_images_as_datasets_writes_them(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [picture, {"bytes": b"2", "path": "2.png"}, None], "label": [0, 1, 2]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (first_key, first), *others = found(path)
    assert isinstance(first, bytes)
    assert (first_key, Image.open(io.BytesIO(first)).getpixel((0, 0))) == ("0", (255, 0, 0))
    assert others == [("2.png", b"2"), ("2", "null_image")]


def test_a_path_without_bytes_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"on the disk")
    image = pa.array([{"bytes": None, "path": str(tmp_path / "1.png")}])
    path = parquet(tmp_path, {"image": image.cast(pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    assert found(path) == [(str(tmp_path / "1.png"), "null_image")]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (["a", None, "ü"], ["a", "1", "ü"]),
        ([7, 8, 9], ["7", "8", "9"]),
        (pa.array([1, None, 300], pa.uint16()), ["1", "1", "300"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"\xff", b""]), ["a", r"\xff", ""]),
        (pa.array(["a", "b", "c"], pa.string_view()), ["a", "b", "c"]),
        (pa.array([0, 1, 2], pa.timestamp("ns")), [f"1970-01-01 00:00:00.00000000{n}" for n in range(3)]),
        (
            pa.array([b"a" * 16, None, b"c" * 16], pa.uuid()),
            [f"{'61' * 4}-6161-6161-6161-{'61' * 6}", "1", f"{'63' * 4}-6363-6363-6363-{'63' * 6}"],
        ),
    ],
    ids=["text", "number", "small", "dictionary", "bytes", "view", "time", "uuid"],
)
def test_key_column(tmp_path: Path, values: Any, keys: list[str]) -> None:
    path = parquet(tmp_path, {"id": values, "image": pa.array(JPEGS, pa.large_binary())})
    assert [key for key, _ in found(path, image="image", key="id")] == keys


@pytest.mark.parametrize(("zone", "ending"), [("UTC", "Z"), ("Z", ""), ("GMT+2", ""), ("Nowhere", "")])
def test_key_column_of_times_in_a_zone(tmp_path: Path, zone: str, ending: str) -> None:
    """Arrow cannot write a time as text where its database lacks the zone."""
    path = parquet(tmp_path, {"id": pa.array([0, None], pa.timestamp("us", zone)), "image": [b"1", b"2"]})
    assert found(path, key="id") == [(f"1970-01-01 00:00:00.000000{ending}", b"1"), ("1", b"2")]


def test_texts_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff/")])
    path = parquet(tmp_path, {"image": [b"1"], "id": raw})
    assert found(path, key="id") == [(r"a\xff/", b"1")]


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"label": [1], "text": ["x"]}, {}, r"no column holds bytes.*label \(int64\), text \(string\)"),
        ({"a": [b"1"], "b": [b"2"]}, {}, r"several columns hold bytes.*a \(binary\), b \(binary\)"),
        ({"a": [b"1"], "b": [b"2"]}, {"image": "c"}, r"input.image=c is not .* a \(binary\), b \(binary\)"),
        ({"a": ["text"]}, {"image": "a"}, r"input.image=a is not one column of bytes among a \(string\)"),
        ({"a": [[b"1"]]}, {}, r"no column holds bytes.* a \(list<"),
        ({"a": [b"1"]}, {"key": "id"}, r"input.key=id is not .* a \(binary\)"),
        ({"a": [b"1"], "id": [[1]]}, {"key": "id"}, r"input.key=id is not .* id \(list<"),
        ({"a": [b"1"], "id": TENSOR}, {"key": "id"}, r"input.key=id is not .* id \(extension<"),
    ],
)
def test_missing_columns_are_one_error_row_that_lists_what_is_there(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    (sample,) = samples(parquet(tmp_path, columns), **config)
    assert sample.key is None
    assert sample.reject is not None
    assert sample.reject.error == "missing_column"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(sample.reject.message)


def test_columns_of_one_name_are_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([b"1"]), pa.array([1])], ["image", "image"]), path)
    assert found(path) == [(None, "missing_column")]


def test_no_rows(tmp_path: Path) -> None:
    assert found(parquet(tmp_path, {"image": pa.array([], pa.binary())})) == []
    assert found(parquet(tmp_path, {"image": pa.array([], pa.string())})) == [(None, "missing_column")]


def test_values_that_are_too_large_are_error_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inputs.samples.MAX_IMAGE_BYTES", 10)
    path = parquet(tmp_path, {"image": [b"x" * 10, b"x" * 11, b"y"]})
    assert found(path) == [("0", b"x" * 10), ("1", "member_too_large"), ("2", b"y")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Parquet file of three row groups of 100 rows, each of four pages with checksums."""
    noise = np.random.default_rng(0).bytes(300 * 500)
    images = [noise[n * 500 : (n + 1) * 500] for n in range(300)]
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    options = {"row_group_size": 100, "use_dictionary": False, "write_batch_size": 5, "data_page_size": 12_000}
    pq.write_table(pa.table({"image": images}), path, write_page_checksum=True, **options)
    return path.read_bytes()


def test_row_groups_and_pages_are_read_in_order(pages: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(pages)
    noise = np.random.default_rng(0).bytes(300 * 500)
    assert found(tmp_path / "a.parquet") == [(str(n), noise[n * 500 : (n + 1) * 500]) for n in range(300)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"PAR1",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-100] + bytes(92) + data[-8:],
        lambda data: b"<html>" * 1000,
    ],
    ids=["0-bytes", "magic", "half", "last-byte", "footer-length", "footer", "html"],
)
def test_parquet_without_its_footer_is_one_error_row(
    pages: bytes, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.parquet").write_bytes(damage(pages))
    assert found(tmp_path / "a.parquet") == [(None, "corrupt_shard")]


def test_damaged_page_keeps_the_rows_before_it(pages: bytes, tmp_path: Path) -> None:
    damaged = bytearray(pages)
    damaged[len(pages) // 2] ^= 1  # in a page of the second row group
    (tmp_path / "a.parquet").write_bytes(damaged)
    *kept, last = found(tmp_path / "a.parquet")
    assert last == (None, "corrupt_shard")
    assert 100 <= len(kept) <= 150
    noise = np.random.default_rng(0).bytes(300 * 500)
    assert kept == [(str(n), noise[n * 500 : (n + 1) * 500]) for n in range(len(kept))]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_parquet_bytes_are_accounted_for(
    pages: bytes, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], in_footer: bool
) -> None:
    damaged = bytearray(pages)
    begin = len(pages) - 8 - int.from_bytes(pages[-8:-4], "little") if in_footer else 0
    for place, new in changes:
        damaged[begin + int(place * (len(pages) - 9 - begin))] = new
    path = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    path.write_bytes(damaged)
    samples(path)  # checks indices and keys
