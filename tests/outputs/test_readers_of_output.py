"""A dataset of ours, opened with what people use, and by the recipes of docs/output.md as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.rows import Columns
from tests.support.pieces import commit, embeddings, new_dataset, piece

DIM = 8
COLUMNS = {
    "float16": Columns(top_k=2, embedding_dtype="float16", embedding_dim=DIM),
    "float32": Columns(top_k=2, embedding_dtype="float32", embedding_dim=DIM),
}
GOOD = [0, 2, 3]  # the indices of each shard that have a prediction; 1 is an error row


def make(folder: Path, columns: Columns, errors: list[int]) -> Path:
    dataset = new_dataset(folder)
    for number in range(2):
        commit(dataset, [piece(columns, number, range(4), errors, salt=number)], 4, columns, number=number)
    commit(dataset, [], 0, columns, number=2)  # an empty part is among them
    return folder


@pytest.fixture(scope="module", params=["float16", "float32"])
def columns(request: pytest.FixtureRequest) -> Columns:
    return COLUMNS[request.param]


@pytest.fixture(scope="module")
def labels(columns: Columns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dataset") / "labels", columns, errors=[1])


@pytest.fixture(scope="module")
def without_errors(columns: Columns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("without errors"), columns, errors=[])


def expected(columns: Columns) -> np.ndarray:
    """The embeddings of all rows, float (N, DIM)."""
    return np.concatenate([embeddings(np.array(GOOD) + number, columns) for number in range(2)])


def test_pandas(labels: Path, columns: Columns):
    import pandas as pd

    rows = pd.read_parquet(labels / "data")
    assert rows["index"].tolist() == GOOD * 2
    assert np.array_equal(np.stack(rows["embedding"]), expected(columns))
    assert rows["label"][0] == "cat"
    assert [best["label"] for best in rows["top_k"][0]] == ["cat", "dog"]
    assert pd.read_parquet(labels / "errors")["error"].tolist() == ["corrupt"] * 2


def test_duckdb(labels: Path, columns: Columns):
    import duckdb

    rows = duckdb.sql(
        f"select * exclude embedding, embedding::float[{DIM}] as embedding from '{labels}/data/*.parquet'"
    )
    assert [row[0] for row in rows.select("index").fetchall()] == GOOD * 2
    assert np.array_equal([row[0] for row in rows.select("embedding").fetchall()], expected(columns))
    # The nearest neighbour of a row, itself among them.
    nearest = duckdb.sql(
        f"""
        with v as (select key, embedding::float[{DIM}] as e from '{labels}/data/*.parquet')
        select b.key from v a, v b where a.key = '0/0/2' order by array_distance(a.e, b.e) limit 1
        """
    )
    assert nearest.fetchall() == [("0/0/2",)]
    counts = duckdb.sql(f"select label, count(*) from '{labels}/data/*.parquet' group by label").fetchall()
    assert dict(counts) == {"cat": 3, "dog": 3}
    best = duckdb.sql(f"select top_k[1].label, top_k[1].score from '{labels}/data/*.parquet' limit 1").fetchall()
    assert best == [("cat", 0.5)]


def test_polars(labels: Path, columns: Columns):
    import polars as pl

    rows = pl.scan_parquet(labels / "data/*.parquet").collect()
    assert rows["index"].to_list() == GOOD * 2
    assert rows["embedding"].dtype == pl.Array(getattr(pl, columns.embedding_dtype.title()), DIM)
    assert np.array_equal(rows["embedding"].to_numpy(), expected(columns))
    assert rows["top_k"].list.first().struct.field("label")[0] == "cat"


def test_pyarrow(labels: Path, columns: Columns):
    rows = pa.dataset.dataset(labels / "data").to_table()
    assert rows["index"].to_pylist() == GOOD * 2
    assert rows.schema.field("embedding").type == pa.list_(
        pa.float16() if columns.embedding_dtype == "float16" else pa.float32(), DIM
    )


def test_faiss_from_one_contiguous_matrix(labels: Path, columns: Columns):
    import faiss

    column = pq.read_table(labels / "data", columns=["embedding"])["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), -1).astype(np.float32)
    assert vectors.flags.c_contiguous
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected(columns))
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    distances, neighbours = index.search(vectors, 1)
    assert np.array_equal(vectors[neighbours[:, 0]], vectors)
    assert not distances.any()


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Hugging Face `datasets`, offline and with a cache of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return datasets


def test_hugging_face_by_files(labels: Path, columns: Columns, datasets: Any):
    files = str(labels / "data/*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train").with_format("numpy")
    assert rows["index"][:].tolist() == GOOD * 2
    assert np.array_equal(rows["embedding"][:], expected(columns))


def test_hugging_face_by_the_card(labels: Path, columns: Columns, datasets: Any):
    rows = datasets.load_dataset(str(labels), split="train")
    assert rows["index"][:] == GOOD * 2
    assert rows.features["embedding"].length == DIM
    errors = datasets.load_dataset(str(labels), "errors", split="train")
    assert errors["stage"][:] == ["decode"] * 2


def test_hugging_face_by_the_card_where_nothing_failed(without_errors: Path, datasets: Any):
    assert not (without_errors / "errors").exists()
    rows = datasets.load_dataset(str(without_errors), split="train")
    assert rows["index"][:] == [0, 1, 2, 3] * 2


def test_our_own_reader(labels: Path, columns: Columns):
    import pipeline

    rows = pipeline.read(str(labels)).to_pandas()
    assert rows["index"].tolist() == GOOD * 2
    assert pipeline.read(str(labels), errors=True)["message"].to_pylist() == ["broken beyond repair"] * 2


# --- The documentation -----------------------------------------------------------------------------------------------

TEXT = (Path(__file__).resolve().parents[2] / "docs/output.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.split()[1])
def test_a_recipe_of_the_docs_runs(recipe: str, labels: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(labels.parent)
    names: dict[str, Any] = {}
    exec(recipe.replace("2048", str(DIM)), names)
    rows = names.get("vectors", names.get("rows"))
    assert rows is None or 0 < len(rows) <= len(GOOD) * 2


def test_there_is_a_recipe_for_each_tool():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("folder", ["data", "errors"])
def test_the_docs_name_every_column(labels: Path, folder: str):
    part = next((labels / folder).glob("*.parquet"))
    schema = pq.read_schema(part)
    missing = [name for name in schema.names if f"`{name}`" not in TEXT]
    assert missing == []
    assert all(f"`{name.decode().removeprefix('resnet_batch.')}`" in TEXT for name in schema.metadata)
