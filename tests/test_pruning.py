"""What is gone from the input is shown, and removed on request; nothing else ever is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.errors import ConfigError, ModelMismatch
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.missing import PRUNED
from pipeline.outputs.commit import retire_shard
from pipeline.outputs.dataset import Dataset
from pipeline.pruning import prune_dataset
from pipeline.storage import Store
from tests.support.datasets import commit_all, rewrite
from tests.support.jobs import digits_config, digits_tars


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruning")
    digits_tars(folder / "shards", 3, 10, broken=[7])
    commit_all(config(folder))
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Iterator[Path]:
    """Shards and their dataset, put back afterwards: under another path they would be other shards."""
    shutil.copytree(first, tmp_path / "backup", copy_function=shutil.copy2)
    yield first
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "backup", first, copy_function=shutil.copy2)


def config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return digits_config(folder / "shards", folder / "labels", **sections)


def files(folder: Path) -> dict[str, int]:
    """Every file of the dataset with the time of its writing, but for the word that a prune leaves."""
    labels = folder / "labels"
    found = [path for path in labels.rglob("*") if path.is_file() and path.name != PRUNED]
    return {path.relative_to(labels).as_posix(): path.stat().st_mtime_ns for path in found}


def of_shard(folder: Path, name: str) -> dict[str, int]:
    return {path: time for path, time in files(folder).items() if f"/{name}" in path}


def test_nothing_is_gone(folder: Path):
    before = files(folder)
    assert pipeline.prune(config(folder), yes=True).gone == []
    assert files(folder) == before


def test_what_is_gone_is_shown_and_removed_only_on_request(folder: Path):
    (folder / "shards/digits-001.tar").unlink()
    before = files(folder)
    mine = of_shard(folder, "digits-001")
    assert {path.partition("/")[0] for path in mine} == {"data", "errors", "_ledger"}
    (gone,) = pipeline.prune(config(folder)).gone
    assert gone.id.startswith("digits-001.tar-")
    assert gone.shard == f"file://{folder}/shards/digits-001.tar"
    assert (gone.predicted, gone.errors, gone.kept, gone.removed) == (9, 1, "", False)
    assert files(folder) == before, "nothing without yes"
    done = pipeline.prune(config(folder), yes=True)
    assert [one.id for one in done.removed] == [gone.id]
    assert done.removable == []
    assert files(folder) == {path: time for path, time in before.items() if path not in mine}
    assert pipeline.verify(str(folder / "labels")).ok
    assert pipeline.prune(config(folder)).gone == []
    assert pipeline.plan(config(folder)).gone == []


@pytest.mark.parametrize("left", ["data", "errors", "_ledger"])
def test_what_stands_alone_of_a_shard_that_is_gone_goes_too(folder: Path, left: str):
    (folder / "shards/digits-001.tar").unlink()
    for path in of_shard(folder, "digits-001"):
        if not path.startswith(left):
            (folder / "labels" / path).unlink()
    (gone,) = pipeline.prune(config(folder)).removable
    assert (gone.predicted, gone.errors) == (9 if left == "data" else 0, 1 if left == "errors" else 0)
    pipeline.prune(config(folder), yes=True)
    assert of_shard(folder, "digits-001") == {}


def test_a_listed_shard_that_is_not_complete_is_left_to_the_next_run(folder: Path):
    next((folder / "labels/_ledger").glob("digits-001*")).unlink()
    before = files(folder)
    assert pipeline.prune(config(folder), yes=True).gone == []
    assert files(folder) == before


def test_files_that_are_not_ours_are_named_and_kept(folder: Path):
    labels = folder / "labels"
    part = next((labels / "data").glob("digits-000*"))
    (labels / "data/mine.parquet").write_bytes(b"something else")
    shutil.copy2(part, labels / "data/copy-of-a-part.parquet")
    shutil.copy2(part, labels / "data/renamed.parquet")
    rewrite(labels / "data/renamed.parquet", shard="file:///elsewhere/digits-000.tar")
    before = files(folder)
    found = pipeline.prune(config(folder), yes=True)
    kept = {gone.id: gone.kept for gone in found.gone}
    assert kept.keys() == {"mine", "copy-of-a-part", "renamed"}
    assert kept["mine"] == kept["renamed"] == "nothing tells that it is ours: look at it, and delete it by hand"
    assert "it says that it is a shard of the input" in kept["copy-of-a-part"]
    assert found.removed == []
    assert files(folder) == before


def test_a_shard_that_is_written_meanwhile_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Another run, with an older listing or a newer one, commits it between the look and the removal."""
    (folder / "shards/digits-001.tar").unlink()

    def late(dataset: Dataset, shard_id: str, shown: Any) -> bool:
        part = folder / "labels/data" / f"{shard_id}.parquet"
        part.write_bytes(part.read_bytes())
        return retire_shard(dataset, shard_id, shown)

    monkeypatch.setattr("pipeline.pruning.retire_shard", late)
    (gone,) = pipeline.prune(config(folder), yes=True).gone
    assert (gone.removed, gone.kept) == (False, "another run has written it meanwhile: look again")
    assert len(of_shard(folder, "digits-001")) == 3


def test_an_empty_listing_is_an_error_unless_it_is_allowed(folder: Path):
    shutil.rmtree(folder / "shards")
    before = files(folder)
    with pytest.raises(ConfigError, match="there is nothing to read"):
        pipeline.prune(config(folder), yes=True)
    assert files(folder) == before
    allowed = config(folder, input={"allow_empty": True})
    assert len(pipeline.prune(allowed).removable) == 3
    assert len(pipeline.prune(allowed, yes=True).removed) == 3
    assert {path.split("/")[0] for path in files(folder)} == {"_dataset.json", "README.md", "_runs"}


def test_another_models_dataset_is_refused(folder: Path):
    (folder / "shards/digits-001.tar").unlink()
    before = files(folder)
    with pytest.raises(ModelMismatch, match="top_k: the dataset has 5, this run 2"):
        pipeline.prune(config(folder, output={"top_k": 2}), yes=True)
    assert files(folder) == before


def test_a_group_whose_files_are_in_other_groups_is_left_to_the_next_run(tmp_path: Path):
    """To remove it here would take rows out of the dataset whose images are still there."""
    photos = tmp_path / "shards"
    photos.mkdir()
    images = load_digits_images().images
    for number in range(30):
        (photos / f"{number:02}.png").write_bytes(encode_png(images[number]))
    job = config(tmp_path, input={"group_size": 5})
    commit_all(job)
    urls = sorted(pipeline.plan(job).done)
    assert len(urls) > 2
    (photos / urls[-1].rpartition("#")[2]).unlink()  # it began a group, whose other files fall to the one before
    before = files(tmp_path)
    (gone,) = pipeline.prune(job, yes=True).gone
    assert gone.shard == urls[-1]
    assert gone.kept == "its files are in other groups now: a run puts these in its place"
    assert files(tmp_path) == before


def test_what_a_store_does_not_list_is_not_removed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Only what the plan and a second look both show."""
    (folder / "shards/digits-001.tar").unlink()
    looks = []
    standing = Dataset.standing

    def changing(dataset: Dataset) -> Any:
        looks.append(dataset)
        found = standing(dataset)
        return {name: one for name, one in found.items() if len(looks) == 1 or not name.startswith("digits-001")}

    monkeypatch.setattr(Dataset, "standing", changing)
    from pipeline.config import make_config

    assert prune_dataset(make_config(config(folder)), yes=True).gone == []
    assert len(of_shard(folder, "digits-001")) == 3
    assert Dataset(str(folder / "labels"), Store()).identity() is not None
