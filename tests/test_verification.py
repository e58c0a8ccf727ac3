"""Every kind of damage is found and named, and a healthy dataset has none."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from typer.testing import CliRunner

import pipeline
from pipeline.cli import app
from pipeline.errors import NotFound, StoreUnavailable
from pipeline.examples.digits import encode_png
from pipeline.examples.tars import write_tar
from pipeline.inputs.shards import shard_id
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.ledger import Standings
from pipeline.storage import Store
from pipeline.verification import verify_dataset
from tests.support.damage import (
    BROKEN_AT,
    DAMAGE,
    PER_SHARD,
    changed_rows,
    embedding_values,
    file_beside,
    planted_embedding,
    with_embeddings,
)
from tests.support.datasets import commit_all, names, part, rewrite, set_column, vouch
from tests.support.jobs import digits_config, digits_tars


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a healthy dataset: three tars of digits, with one picture that cannot be read in each."""
    folder = tmp_path_factory.mktemp("healthy")
    digits_tars(folder / "shards", 3, PER_SHARD, broken=[BROKEN_AT])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config, "20260101T000000Z-aaaaaaaa")
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


@pytest.mark.parametrize("also_gone", [(), ("_runs",), ("_ledger",), ("data",)])
def test_a_dataset_whose_description_is_lost_is_not_called_empty(also_gone: tuple[str, ...], dataset: Dataset):
    """Not copied with the rest, for instance; or its run died between the deletion of a claim and the next one."""
    for name in also_gone:
        shutil.rmtree(Path(dataset.url, name))
    described = Path(dataset.url, "_dataset.json")
    fingerprint = dataset.known_identity()["model_fingerprint"]
    described.unlink()
    found = pipeline.verify(dataset.url)
    (problem,) = found.problems
    assert (found.ok, found.note) == (False, "nothing else was checked")
    assert problem.startswith(f"{described} is missing")
    assert f"a run of the same model ({fingerprint}) that has a shard to do writes it" in problem
    assert CliRunner().invoke(app, ["verify", dataset.url]).exit_code == 1
    for ask in (pipeline.status, pipeline.dead_letters, pipeline.read):
        with pytest.raises(NotFound) as refused:
            ask(dataset.url)
        assert str(refused.value) == problem


def test_what_says_nothing_in_a_dataset_without_a_description_is_not_called_nothing(dataset: Dataset):
    Path(dataset.url, "_dataset.json").unlink()
    for folder in ("data", "_ledger"):
        for path in Path(dataset.url, folder).iterdir():
            path.write_bytes(b"no file of ours")
    (problem,) = pipeline.verify(dataset.url).problems
    assert "_dataset.json is missing, and what data and _ledger hold is damaged or not ours" in problem


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, dataset: Dataset):
    damage, message = DAMAGE[name]
    damage(dataset)
    found = pipeline.verify(dataset.url)
    assert not found.ok
    problems = [problem for problem in found.problems if message in problem]
    assert problems, found.problems
    gone = name in ("deleted part", "lost shard")
    shard = "digits-000" if gone else "0-foreign" if "0-foreign" in message else names(dataset)[0]
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


@pytest.mark.parametrize(
    ("folder", "name", "is_image"),
    [
        ("photos", "{:02}.png", True),
        ("photos", "a#{:02}.png", True),
        ("photos #1/in", "{:02}.png", True),
        ("photos #1/in", "b#{:02}.png", False),
    ],
    ids=["plain", "# in names", "# in the root", "error rows alone"],
)
def test_files_that_stand_in_two_groups_are_found_without_the_first_group(
    folder: str, name: str, is_image: bool, tmp_path: Path
):
    """Which has no file of its own where the first of all begins a group, or is damaged itself."""
    (tmp_path / folder).mkdir(parents=True)
    for number in range(40):
        image = encode_png(np.full((32, 32), number, np.uint8)) if is_image else b"no image"
        (tmp_path / folder / name.format(number)).write_bytes(image)
    config = digits_config(tmp_path / folder, tmp_path / "labels", input={"group_size": 5})
    dataset = commit_all(config)
    first, second, third, *_ = (shard_id(url) for url in sorted(pipeline.plan(config).done))
    for path in Path(dataset.url).rglob(f"{first}.*"):
        path.unlink()
    assert pipeline.verify(dataset.url).ok
    footer = dataset.read_footer("data", third)
    paths = [path for path in (Path(dataset.url, f, f"{second}.parquet") for f in ("data", "errors")) if path.exists()]
    for path in paths:
        rewrite(path, lambda rows: rows, last_path=footer.last_path)
    vouch(dataset, second)
    (problem,) = pipeline.verify(dataset.url).problems
    assert problem == f"{third}: its first files stand in {second} as well. A run puts it right."
