"""Every kind of damage is found and named, and a healthy dataset has none."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pipeline
from pipeline.cli import app
from pipeline.errors import NotFound, StoreUnavailable
from pipeline.examples.digits import encode_png
from pipeline.examples.tars import write_tar
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import Mark, Standings, commit_hash
from pipeline.storage import Store
from pipeline.verification import verify_dataset
from tests.support.datasets import commit_all, mark, names, part, rewrite, set_column, vouch
from tests.support.jobs import digits_config, digits_tars

PER_SHARD = 20
BROKEN_AT = 7


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a healthy dataset: three tars of digits, with one picture that cannot be read in each."""
    folder = tmp_path_factory.mktemp("healthy")
    digits_tars(folder / "shards", 3, PER_SHARD, broken=[BROKEN_AT])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config)
    return config


@pytest.fixture
def dataset(job: dict[str, Any], tmp_path: Path) -> Dataset:
    """A copy to damage."""
    shutil.copytree(job["output"]["url"], tmp_path / "labels", copy_function=shutil.copy2)
    return Dataset(str(tmp_path / "labels"), Store())


# --- A healthy dataset ---------------------------------------------------------------------------------------------


def test_a_healthy_dataset_has_no_problem(job: dict[str, Any]):
    found = pipeline.verify(job["output"]["url"])
    assert found.ok, str(found)
    assert (found.shards, found.predicted, found.errors) == (3, 57, 3)
    assert str(found) == "3 shards, 57 rows, 3 error rows: all is well"


def test_a_healthy_dataset_agrees_when_it_is_computed_again(job: dict[str, Any]):
    found = pipeline.verify(job["output"]["url"], sample=10, config=job)
    assert found.ok, str(found)
    assert (found.sampled, found.agreed) == (10, 10)
    assert str(found) == "3 shards, 57 rows, 3 error rows; 10 of 10 recomputed rows agree: all is well"
    everything = pipeline.verify(job["output"]["url"], sample=1000, config=job)
    assert (everything.sampled, everything.agreed) == (57, 57)


@pytest.mark.parametrize("columns", [{"predictions": False}, {"embeddings": False}, {"embedding_dtype": "float32"}])
def test_other_columns_are_as_healthy(columns: dict[str, Any], job: dict[str, Any], tmp_path: Path):
    config = digits_config(job["input"]["url"], tmp_path / "labels", output=columns)
    commit_all(config)
    found = pipeline.verify(str(tmp_path / "labels"), sample=5, config=config)
    assert found.ok, str(found)
    assert found.agreed == 5


def test_shards_without_samples_or_without_predictions_are_healthy(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "empty.tar", [])
    write_tar(tmp_path / "shards" / "bad.tar", [("a.png", b"no image")])
    config = digits_config(tmp_path / "shards", tmp_path / "labels")
    commit_all(config)
    found = pipeline.verify(str(tmp_path / "labels"), sample=5, config=config)
    assert (found.ok, found.shards, found.predicted, found.errors, found.sampled) == (True, 2, 0, 1, 0)


def test_where_there_is_no_dataset(tmp_path: Path):
    with pytest.raises(NotFound, match=r"no dataset at .*: it has no _dataset.json"):
        pipeline.verify(str(tmp_path))


def test_after_a_night_with_nothing_to_do_there_is_nothing_wrong(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    pipeline.run(digits_config(tmp_path / "shards", tmp_path / "labels", input={"allow_empty": True}))
    found = pipeline.verify(tmp_path / "labels")
    assert (found.ok, found.shards, found.note) == (True, 0, "no run has committed a shard yet")
    with pytest.raises(NotFound, match="holds nothing yet: no run has committed a shard"):
        pipeline.status(tmp_path / "labels")


# --- Damage ----------------------------------------------------------------------------------------------------------


def delete_part(d: Dataset) -> None:
    part(d).unlink()


def delete_mark(d: Dataset) -> None:
    mark(d).unlink()


def delete_errors_part(d: Dataset) -> None:
    part(d, folder="errors").unlink()


def foreign_part(d: Dataset) -> None:
    shutil.copy2(part(d), part(d).with_name("0-foreign.parquet"))


def foreign_part_with_a_mark(d: Dataset) -> None:
    foreign_part(d)
    vouch(d, "0-foreign")


def foreign_errors_part(d: Dataset) -> None:
    shutil.copy2(part(d, folder="errors"), part(d, folder="errors").with_name("0-foreign.parquet"))


def errors_part_of_another_shard(d: Dataset) -> None:
    shutil.copy2(part(d, 1, "errors"), part(d, 0, "errors"))
    vouch(d, names(d)[0])


def extra_mark(d: Dataset) -> None:
    shutil.copy2(mark(d), mark(d).with_name(f"{names(d)[0]}.0123456789abcdef.0123456789abcdef.json"))


def stale_mark(d: Dataset) -> None:
    shard, fingerprint, _, _ = mark(d).name.rsplit(".", 3)
    mark(d).rename(mark(d).with_name(f"{shard}.{fingerprint}.0123456789abcdef.json"))


def mark_for_another_source(d: Dataset) -> None:
    shard, _, commit, _ = mark(d).name.rsplit(".", 3)
    mark(d).rename(mark(d).with_name(f"{shard}.0123456789abcdef.{commit}.json"))


def mark_that_counts_otherwise(d: Dataset) -> None:
    mark(d).write_text(mark(d).read_text().replace('"predicted": 19', '"predicted": 18'))


def torn_mark(d: Dataset) -> None:
    mark(d).write_text(mark(d).read_text()[:30])


def part_that_was_touched(d: Dataset) -> None:
    rewrite(part(d), set_column("label", 3, "9"))


def changed(name: str, value: Any, place: int = 3) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        rewrite(part(d), set_column(name, place, value))
        vouch(d, names(d)[0])

    damage.__name__ = f"{name}={value}"
    return damage


def changed_rows(change: Callable[[pa.Table], pa.Table], **footer: Any) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        rewrite(part(d), change, **footer)
        vouch(d, names(d)[0])

    return damage


def cut(d: Dataset) -> None:
    data = part(d).read_bytes()
    part(d).write_bytes(data[: len(data) // 2])


def cut_but_vouched_for(d: Dataset) -> None:
    name, body = names(d)[0], mark(d).read_text()
    whole = part(d).read_bytes()
    vouch_for_bytes(d, name, whole[: len(whole) // 2], body)


def vouch_for_bytes(d: Dataset, name: str, data: bytes, body: str) -> None:
    """A mark that is to be believed beside a part that is not even Parquet."""
    fingerprint = mark(d).name.rsplit(".", 3)[1]
    mark(d).unlink()
    part(d).write_bytes(data)
    standing = d.standing_of(name)
    assert standing.part is not None
    path = Path(d.url, "_ledger", Mark(name, fingerprint, commit_hash(standing.part, standing.errors)).name)
    path.write_text(body)


def garbled(d: Dataset) -> None:
    """The pages of a column overwritten, the footer as it was."""
    data = bytearray(part(d).read_bytes())
    data[8:600] = b"\xff" * 592
    vouch_for_bytes(d, names(d)[0], bytes(data), mark(d).read_text())


def no_parquet_at_all(d: Dataset) -> None:
    vouch_for_bytes(d, names(d)[0], b"", mark(d).read_text())


def parquet_of_somebody_else(d: Dataset) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    vouch_for_bytes(d, names(d)[0], buffer.getvalue(), mark(d).read_text())


def embedding_values(rows: pa.Table) -> np.ndarray:
    """(rows, 64), a copy."""
    return rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 64).copy()


def with_embeddings(rows: pa.Table, values: np.ndarray) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return rows.set_column(rows.schema.get_field_index("embedding"), "embedding", column)


def planted_embedding(value: float) -> Callable[[Dataset], None]:
    def plant(rows: pa.Table) -> pa.Table:
        values = embedding_values(rows)
        values[2, 5] = value
        return with_embeddings(rows, values)

    return changed_rows(plant)


def flipped_bit(d: Dataset) -> None:
    """In the last embedding of the part, whose pages are not compressed: it stays a number, and size and time stay."""
    path = part(d)
    data, found = bytearray(path.read_bytes()), path.stat()
    last = embedding_values(pq.read_table(path))[-1].tobytes()
    data[data.rindex(last) + 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def part_of_another_shard(d: Dataset) -> None:
    first, second = part(d, 0), part(d, 1)
    shutil.copy2(second, first)
    shutil.copy2(part(d, 1, "errors"), part(d, 0, "errors"))
    body, fingerprint = mark(d).read_text(), mark(d).name.rsplit(".", 3)[1]
    mark(d).unlink()
    standing = d.standing_of(names(d)[0])
    assert standing.part is not None
    Path(d.url, "_ledger", Mark(names(d)[0], fingerprint, commit_hash(standing.part, standing.errors)).name).write_text(
        body
    )


def narrower_embeddings(d: Dataset) -> None:
    rewrite(part(d), lambda rows: with_embeddings(rows, embedding_values(rows)[:, :32]))
    vouch(d, names(d)[0])


def edited_top_k(edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Dataset], None]:
    """Of one row; its first entry stays what the row says."""

    def change(rows: pa.Table) -> pa.Table:
        return set_column("top_k", 3, edit(rows["top_k"][3].as_py()))(rows)

    return changed_rows(change)


def file_beside(name: str) -> Callable[[Dataset], None]:
    def damage(d: Dataset) -> None:
        Path(d.url, name).parent.mkdir(exist_ok=True)
        Path(d.url, name).write_bytes(b"?")

    return damage


DAMAGE: dict[str, tuple[Callable[[Dataset], None], str]] = {
    "deleted part": (delete_part, "not committed: 1 mark, and there is an errors part"),
    "part without a mark": (delete_mark, "not committed: no marks, and there is a part and an errors part"),
    "missing errors part": (delete_errors_part, "its mark counts 1 error rows, and there is no errors part"),
    "foreign part": (foreign_part, "0-foreign: not committed: no marks, and there is a part"),
    "foreign part with a mark": (foreign_part_with_a_mark, "0-foreign: it is the part of another shard, file://"),
    "foreign errors part": (foreign_errors_part, "0-foreign: not committed: no marks, and there is an errors part"),
    "another shard's errors": (errors_part_of_another_shard, "its errors part says"),
    "extra mark": (extra_mark, "not committed: 2 marks, and there is a part and an errors part"),
    "stale mark": (stale_mark, "its mark vouches for other versions than those that stand there"),
    "mark of another source": (mark_for_another_source, "its mark is for source 0123456789abcdef"),
    "mark counts otherwise": (mark_that_counts_otherwise, "its mark says"),
    "torn mark": (torn_mark, ".json is damaged or not ours"),
    "touched part": (part_that_was_touched, "its mark vouches for other versions than those that stand there"),
    "changed label": (changed("label", "9"), "whose class_id, label and score are not the first of their top_k"),
    "changed class": (changed("class_id", 11), "whose class_id, label and score are not the first of their top_k"),
    "changed score": (changed("score", 0.125), "whose class_id, label and score are not the first of their top_k"),
    "empty top_k": (changed("top_k", []), "rows with an empty top_k"),
    "null label": (changed("label", None), "label is null in 1 rows"),
    "row of another shard": (changed("shard", "file:///x.tar"), "rows of other shards than file://"),
    "duplicate index": (changed("index", 4), "index 4 stands twice"),
    "index of an error row": (changed("index", BROKEN_AT), f"index {BROKEN_AT} stands twice"),
    "index beyond": (changed("index", 99), "index 99 is none of the 20 listed"),
    "negative index": (changed("index", -1), "index -1 is none of the 20 listed"),
    "missing row": (changed_rows(lambda rows: rows.slice(1)), "18 rows and 1 error rows, its footer says 19 and 1"),
    "missing index": (
        changed_rows(lambda rows: rows.slice(2), predicted=17, listed=18),
        "index 0 is missing, and 1 more",
    ),
    "wrong footer count": (
        changed_rows(lambda rows: rows, predicted=20),
        "19 rows and 1 error rows, its footer says 20",
    ),
    "counts that don't add up": (
        changed_rows(lambda rows: rows, listed=21),
        "21 samples listed, but 19 predicted and 1",
    ),
    "another model": (changed_rows(lambda rows: rows, model_fingerprint="cafe"), "model cafe, but the dataset is"),
    "not a number": (planted_embedding(np.nan), "embeddings that are not finite"),
    "infinite": (planted_embedding(-np.inf), "embeddings that are not finite"),
    "flipped bit": (flipped_bit, ".parquet is damaged or not ours: "),
    "part of another shard": (part_of_another_shard, "it is the part of another shard, file://"),
    "labels only": (
        changed_rows(lambda rows: rows.drop_columns(["embedding"])),
        "damaged or not ours: its columns are",
    ),
    "other type of embeddings": (
        changed_rows(lambda rows: with_embeddings(rows, embedding_values(rows).astype(np.float32))),
        "damaged or not ours: its columns are",
    ),
    "narrower embeddings": (narrower_embeddings, "its embeddings have 32 numbers, those of other shards 64"),
    "top_k in disorder": (
        edited_top_k(lambda top: [top[0], *reversed(top[1:])]),
        "rows whose top_k is not in descending order",
    ),
    "top_k too short": (edited_top_k(lambda top: top[:2]), "rows that do not have 5 entries in their top_k"),
    "label in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"label": "cat"}]),
        "labels that are not the names of their class_id",
    ),
    "class in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"class_id": 10}]),
        "class ids that are none of the 10 classes",
    ),
    "score in top_k": (
        edited_top_k(lambda top: [*top[:4], top[4] | {"score": float("nan")}]),
        "scores that are not between 0 and 1",
    ),
    "column missing": (changed_rows(lambda rows: rows.drop_columns(["width"])), "damaged or not ours: its columns are"),
    "list of any size": (
        changed_rows(
            lambda rows: rows.set_column(
                rows.schema.get_field_index("embedding"), "embedding", rows["embedding"].cast(pa.list_(pa.float16()))
            )
        ),
        "embedding is list",
    ),
    "truncated": (cut, "its mark vouches for other versions than those that stand there"),
    "truncated but vouched for": (cut_but_vouched_for, ".parquet is damaged or not ours: "),
    "garbled pages": (garbled, ".parquet is damaged or not ours: "),
    "empty file": (no_parquet_at_all, ".parquet is damaged or not ours: "),
    "somebody else's Parquet": (parquet_of_somebody_else, ".parquet is damaged or not ours: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, dataset: Dataset):
    damage, message = DAMAGE[name]
    damage(dataset)
    found = pipeline.verify(dataset.url)
    assert not found.ok
    problems = [problem for problem in found.problems if message in problem]
    assert problems, found.problems
    shard = "0-foreign" if "0-foreign" in message else names(dataset)[0] if name != "deleted part" else "digits-000"
    assert all(problem.startswith(shard) for problem in found.problems), "the others are healthy"
    ran = CliRunner().invoke(app, ["verify", dataset.url])
    assert ran.exit_code == 1
    assert problems[0] in ran.stdout


@pytest.mark.parametrize(
    "name",
    ["data/notes.txt", "data/deeper/a.parquet", "errors/a.json", "_ledger/readme", "_ledger/old/a.0.0.json"],
)
def test_files_of_others_among_ours_are_named(name: str, dataset: Dataset):
    """`pd.read_parquet("labels/data")` reads them, or fails over them."""
    file_beside(name)(dataset)
    assert pipeline.verify(dataset.url).problems == [f"{name} is no file of this dataset"]


@pytest.mark.parametrize("name", ["data/.DS_Store", "data/_SUCCESS", "notes.txt", "_runs/x"])
def test_files_that_nobody_takes_for_rows_are_left_alone(name: str, dataset: Dataset):
    file_beside(name)(dataset)
    assert pipeline.verify(dataset.url).ok


def test_what_a_dead_writer_left_is_named_and_a_living_one_is_not(dataset: Dataset):
    left = Path(dataset.url, "data", f".{'a' * 32}.tmp")
    with left.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert pipeline.verify(dataset.url).ok
    (problem,) = pipeline.verify(dataset.url).problems
    assert problem == f"data/{left.name} was left by a writer that died; the next run removes it"
    assert left.exists()


def test_embeddings_whose_norm_overflows_are_found(job: dict[str, Any], tmp_path: Path):
    """As float32, which has room for the numbers and none for the sum of their squares."""
    commit_all(digits_config(job["input"]["url"], tmp_path / "labels", output={"embedding_dtype": "float32"}))
    dataset = Dataset(str(tmp_path / "labels"), Store())
    planted_embedding(1e30)(dataset)
    (problem,) = pipeline.verify(dataset.url).problems
    assert problem.endswith("embeddings that are not finite, or whose norm is not")


def test_embeddings_of_zeros_are_counted_and_no_problem(dataset: Dataset):
    """A network may answer so. But they have no direction, which whoever divides by the norm should know."""
    rewrite(part(dataset), lambda rows: with_embeddings(rows, embedding_values(rows) * (np.arange(19) > 1)[:, None]))
    vouch(dataset, names(dataset)[0])
    found = pipeline.verify(dataset.url)
    assert (found.ok, found.zero_embeddings) == (True, 2)
    assert str(found).splitlines()[1] == "2 embeddings are all zeros"


def test_an_errors_part_whose_stage_nobody_knows(dataset: Dataset):
    rewrite(part(dataset, folder="errors"), set_column("stage", 0, "guess"))
    vouch(dataset, names(dataset)[0])
    (problem,) = pipeline.verify(dataset.url).problems
    assert problem.endswith("errors part: error rows of another stage than read, decode, predict")


def test_an_errors_part_that_no_mark_counts(dataset: Dataset, tmp_path: Path):
    digits_tars(tmp_path / "whole", 1, 5)
    commit_all(digits_config(tmp_path / "whole", tmp_path / "other"))
    other = Dataset(str(tmp_path / "other"), Store())
    Path(other.url, "errors").mkdir()
    shutil.copy2(part(dataset, folder="errors"), part(other, folder="errors"))
    (problem,) = pipeline.verify(other.url).problems
    assert "there is an errors part, and its mark counts no error rows" in problem


def test_a_store_that_is_down_is_no_damage(dataset: Dataset):
    class Down(Store):
        def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
            if url.endswith(".parquet"):
                raise StoreUnavailable("down")
            return super().open(url, version, read_ahead)

    with pytest.raises(StoreUnavailable):
        verify_dataset(Dataset(dataset.url, Down()))


def test_a_shard_that_is_committed_while_the_dataset_is_listed_is_no_problem(dataset: Dataset):
    class BetweenListings(Dataset):
        def standing(self) -> Standings:
            found = super().standing()
            return Standings({}, {name: found[name].part for name in found}, {})

    assert verify_dataset(BetweenListings(dataset.url, dataset.store)).ok


def test_a_part_that_is_replaced_meanwhile_is_not_called_damaged(dataset: Dataset):
    replace = changed_rows(lambda rows: rows.slice(1))

    class Meanwhile(Store):
        replaced = 0

        def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
            if url.endswith(f"data/{part(dataset).name}") and not Meanwhile.replaced:
                Meanwhile.replaced += 1
                replace(dataset)
            return super().open(url, version, read_ahead)

    (problem,) = verify_dataset(Dataset(dataset.url, Meanwhile())).problems
    assert "it changed while it was checked, verify again" in problem
    problems = verify_dataset(dataset).problems
    assert problems
    assert not any("changed while" in problem for problem in problems), "it stays damaged"


def test_files_that_stand_in_two_groups_are_found(tmp_path: Path):
    """As when a slower run commits a group again that has lost its end to a new one meanwhile."""
    (tmp_path / "photos").mkdir()
    for number in range(40):
        (tmp_path / f"photos/{number:02}.png").write_bytes(encode_png(np.full((32, 32), number, np.uint8)))
    config = digits_config(tmp_path / "photos", tmp_path / "labels", input={"group_size": 8})
    commit_all(config)
    groups = pipeline.plan(config).done
    assert len(groups) > 2
    assert pipeline.verify(tmp_path / "labels").ok
    whole = digits_config(tmp_path / "photos", tmp_path / "whole", input={"group_size": 10**9})
    commit_all(whole)
    (first,) = Path(tmp_path / "whole/data").iterdir()
    dataset = Dataset(str(tmp_path / "labels"), Store())
    shutil.copy2(first, tmp_path / "labels/data" / first.name)
    vouch(dataset, first.name.removesuffix(".parquet"))
    problems = pipeline.verify(tmp_path / "labels").problems
    assert len(problems) == len(groups) - 1
    assert all(f"stand in {first.stem} as well. A run puts it right" in problem for problem in problems)
