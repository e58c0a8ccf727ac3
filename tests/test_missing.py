"""Shards of the input of which nothing stands: lost where a run has committed them, else to be done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline.errors import StoreUnavailable
from pipeline.examples.digits import encode_png
from pipeline.inputs.shards import Shard, shard_id
from pipeline.missing import _judged, _last_commits, find_missing
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store
from tests.support.damage import lose_a_shard
from tests.support.datasets import commit_all, names
from tests.support.jobs import digits_config, digits_tars

FIRST, SECOND = "20260101T000000Z-aaaaaaaa", "20260102T000000Z-aaaaaaaa"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """The config of three tars of digits, one picture in each broken, of which a run has committed all."""
    digits_tars(tmp_path / "shards", 3, 4, broken=[2])
    config = digits_config(tmp_path / "shards", tmp_path / "labels")
    commit_all(config, FIRST)
    return config


@pytest.fixture
def dataset(job: dict[str, Any]) -> Dataset:
    return Dataset(job["output"]["url"], Store())


def report(dataset: Dataset, run_id: str, **changes: Any) -> None:
    """A report like the first run's, but for this."""
    text = Path(dataset.url, "_runs", FIRST, "report.json").read_text()
    Path(dataset.url, "_runs", run_id).mkdir(exist_ok=True)
    Path(dataset.url, "_runs", run_id, "report.json").write_text(json.dumps(json.loads(text) | changes))


def url_of(job: dict[str, Any], number: int) -> str:
    return f"file://{job['input']['url']}/digits-{number:03}.tar"


# --- Lost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [True, False])
def test_a_shard_that_was_committed_and_does_not_stand_is_a_problem(
    with_config: bool, job: dict[str, Any], dataset: Dataset
):
    lose_a_shard(dataset)
    found = pipeline.verify(dataset.url, config=job if with_config else None)
    url = url_of(job, 0)
    assert found.problems == [
        f"{shard_id(url)}: nothing of {url} stands, though run {FIRST} committed it. A run does it again."
    ]
    assert (found.ok, found.shards, found.note) == (False, 2, "")
    commit_all(job, SECOND)
    assert pipeline.verify(dataset.url).ok


def test_the_last_run_that_committed_it_is_named(job: dict[str, Any], dataset: Dataset):
    report(dataset, SECOND, committed=[url_of(job, 0)])
    report(dataset, "20260103T000000Z-aaaaaaaa", committed=[])
    lose_a_shard(dataset)
    (problem,) = pipeline.verify(dataset.url).problems
    assert f"run {SECOND} committed it" in problem


@pytest.mark.parametrize("also_gone", [(), ("_dataset.json",)])
def test_all_shards_lost_is_not_called_nothing(also_gone: tuple[str, ...], dataset: Dataset):
    for name in ("data", "errors", "_ledger"):
        shutil.rmtree(Path(dataset.url, name))
    for name in also_gone:
        Path(dataset.url, name).unlink()
    found = pipeline.verify(dataset.url)
    assert (len(found.problems), found.note) == (3, "")


def test_a_shard_that_is_committed_meanwhile_is_not_lost(job: dict[str, Any], dataset: Dataset):
    """Between the listing of what stands and the reading of the reports."""
    standing = set(names(dataset)[1:])
    fingerprint = dataset.known_identity()["model_fingerprint"]
    found = find_missing(dataset, fingerprint, standing, (), None)
    assert (found.problems, found.note) == ([], "")


def test_rows_of_a_model_that_was_here_before_are_not_lost(job: dict[str, Any], dataset: Dataset):
    report(dataset, FIRST, model_fingerprint="another")
    lose_a_shard(dataset)
    found = pipeline.verify(dataset.url)
    assert found.ok
    assert "1 shard of the input has no rows yet" in found.note


def test_loose_files_may_have_been_grouped_anew(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number in range(30):
        (tmp_path / f"photos/{number:02}.png").write_bytes(encode_png(np.full((8, 8), number, np.uint8)))
    config = digits_config(tmp_path / "photos", tmp_path / "labels", input={"group_size": 8})
    dataset = commit_all(config)
    first = names(dataset)[0]
    for path in Path(dataset.url).rglob(f"{first}.*"):
        path.unlink()
    found = pipeline.verify(dataset.url)
    assert found.ok
    assert found.note.startswith("1 shard of the input has no rows yet; a run does it: file://")


# --- Pruned ----------------------------------------------------------------------------------------------------------


def test_what_was_pruned_and_has_come_back_is_to_be_done(job: dict[str, Any], dataset: Dataset, tmp_path: Path):
    tar = Path(job["input"]["url"], "digits-001.tar")
    tar.rename(tmp_path / "away.tar")
    assert len(pipeline.prune(job, yes=True).removed) == 1
    (tmp_path / "away.tar").rename(tar)
    found = pipeline.verify(dataset.url)
    assert (found.ok, found.note) == (True, f"1 shard of the input has no rows yet; a run does it: file://{tar}")
    commit_all(job, "99990101T000000Z-aaaaaaaa")  # after the prune
    assert (pipeline.verify(dataset.url).ok, pipeline.verify(dataset.url).note) == (True, "")
    for path in [*Path(dataset.url).rglob(f"{shard_id(url_of(job, 1))}.*")]:
        path.unlink()
    assert not pipeline.verify(dataset.url).ok


def test_what_a_narrower_prune_removed_is_to_be_done(job: dict[str, Any], dataset: Dataset):
    narrow = digits_config(f"{job['input']['url']}/digits-000.tar", dataset.url)
    assert len(pipeline.prune(narrow).removable) == 2
    assert not list(Path(dataset.url).rglob("pruned.json")), "nothing is removed yet"
    assert len(pipeline.prune(narrow, yes=True).removed) == 2
    found = pipeline.verify(dataset.url)
    assert found.ok
    assert found.note.startswith("2 shards of the input have no rows yet; a run does them: file://")


def test_a_prune_leaves_word_before_it_removes(job: dict[str, Any], dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    def die(*_: object) -> bool:
        raise StoreUnavailable("down")

    monkeypatch.setattr("pipeline.pruning.retire_shard", die)
    Path(job["input"]["url"], "digits-001.tar").unlink()
    with pytest.raises(StoreUnavailable):
        pipeline.prune(job, yes=True)
    (word,) = Path(dataset.url).glob("_runs/*/pruned.json")
    assert json.loads(word.read_text()) == {"removed": [url_of(job, 1)]}


# --- Still to be done ------------------------------------------------------------------------------------------------


def test_shards_that_no_run_has_committed_are_counted(job: dict[str, Any], dataset: Dataset):
    tars = [Path(job["input"]["url"], f"new-{number}.tar") for number in range(5)]
    for tar in tars:
        shutil.copy(Path(job["input"]["url"], "digits-000.tar"), tar)
    found = pipeline.verify(dataset.url)
    assert found.ok
    assert found.note.startswith("5 shards of the input have no rows yet; a run does them: ")
    assert found.note.endswith(" and 2 more")
    assert found.note.count("file://") == 3
    assert str(found).splitlines()[1] == found.note


# --- What cannot be told ---------------------------------------------------------------------------------------------


def no_report(dataset: Dataset, job: dict[str, Any]) -> dict[str, Any] | None:
    shutil.rmtree(Path(dataset.url, "_runs"))
    return None


def no_input(dataset: Dataset, job: dict[str, Any]) -> dict[str, Any] | None:
    return digits_config(Path(dataset.url, "nothing"), dataset.url)


def no_store(dataset: Dataset, job: dict[str, Any]) -> dict[str, Any] | None:
    storage = {"endpoint_url": "http://127.0.0.1:9", "deadline_s": 0.5}
    return digits_config("s3://raw/*.tar", dataset.url, input={"storage": storage})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_report, "no report tells how they were made. Give --config."),
        (no_input, "there is nothing to read under"),
        (no_store, "cannot list s3://raw"),
    ],
)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_input_that_cannot_be_listed_is_told_and_changes_nothing_else(
    make: Callable[[Dataset, dict[str, Any]], dict[str, Any] | None],
    says: str,
    is_damaged: bool,
    job: dict[str, Any],
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    if is_damaged:
        next(Path(dataset.url, "_ledger").iterdir()).unlink()
    found = pipeline.verify(dataset.url, config=make(dataset, job))
    assert (found.ok, len(found.problems)) == (not is_damaged, int(is_damaged))
    assert found.note.startswith("what of the input has no rows is not known: ")
    assert says in found.note


@pytest.mark.parametrize("text", ["{", "[]", '{"committed": 3}', '{"committed": [3, null]}'])
def test_a_damaged_report_says_nothing(text: str, job: dict[str, Any], dataset: Dataset):
    report(dataset, SECOND)
    Path(dataset.url, "_runs", SECOND, "report.json").write_text(text)
    lose_a_shard(dataset)
    (problem,) = pipeline.verify(dataset.url, config=job).problems
    assert f"run {FIRST} committed it" in problem


def test_reports_are_read_one_at_a_time_and_none_without_need(job: dict[str, Any], dataset: Dataset):
    for day in range(3, 9):
        report(dataset, f"2026010{day}T000000Z-aaaaaaaa", committed=[])
    read: list[str] = []

    class Counting(Store):
        def read(self, url: str, version: str | None = None, limit: int = -1) -> bytes:
            read.append(url)
            return super().read(url, version, limit)

    watched = Dataset(dataset.url, Counting())
    assert _last_commits(watched, [], None) == {}
    assert read == []
    url = url_of(job, 0)
    assert _last_commits(watched, [url], None) == {url: FIRST}
    assert len(read) == 7
    report(dataset, "20260109T000000Z-aaaaaaaa", committed=[url])
    read.clear()
    assert _last_commits(watched, [url], None) == {url: "20260109T000000Z-aaaaaaaa"}
    assert len(read) == 1, "newest first"


def test_of_urls_that_differ_in_their_queries_a_report_tells_none_apart(job: dict[str, Any]):
    new = Shard("https://h/a.tar?v=2", "new", "webdataset", "", 1)
    assert _judged([new], {"https://h/a.tar"}) == {}, "this may be the other one, which stands"
    assert _judged([new], set()) == {"new": "https://h/a.tar"}
    plain = Shard("https://h/a.tar", "plain", "webdataset", "", 1)
    assert _judged([plain], {"https://h/a.tar"}) == {"plain": "https://h/a.tar"}, "a part that lies"
