"""What a dataset is and how much it holds, without opening a part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import pipeline
from pipeline.errors import FatalError, NotFound
from pipeline.inputs.shards import shard_id
from pipeline.outputs.dataset import Dataset
from pipeline.overview import read_status
from pipeline.storage import Store
from tests.support.datasets import commit_all
from tests.support.jobs import digits_config, digits_tars


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("status")
    digits_tars(folder / "shards", 3, 10, broken=[7])
    return digits_config(folder / "shards", folder / "labels")


@pytest.fixture
def dataset(job: dict[str, Any], tmp_path: Path) -> Path:
    config = digits_config(job["input"]["url"], tmp_path / "labels")
    commit_all(config, "20260101T000000Z-aaaaaaaa")
    return tmp_path / "labels"


def test_it_tells_model_counts_and_runs(dataset: Path):
    found = pipeline.status(str(dataset))
    assert (found.url, found.num_classes) == (str(dataset), 10)
    assert found.model["name"] == "pipeline.examples.network:digits_resnet20"
    assert (found.shards, found.predicted, found.errors, found.incomplete) == (3, 27, 3, [])
    assert found.num_bytes == sum(path.stat().st_size for path in (dataset / "data").iterdir())
    (run,) = found.last_runs
    assert (run["run_id"], run["message"], run["predicted"]) == ("20260101T000000Z-aaaaaaaa", "3 shards committed", 27)


def test_it_opens_no_part(dataset: Path):
    class NoParts(Store):
        def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
            assert not url.endswith(".parquet"), url
            return super().open(url, version, read_ahead)

    assert read_status(Dataset(str(dataset), NoParts())).predicted == 27


def test_shards_whose_files_do_not_agree_are_to_be_done_again(dataset: Path):
    parts = sorted((dataset / "data").iterdir())
    parts[0].unlink()
    next((dataset / "_ledger").glob(f"{parts[1].stem}.*")).unlink()
    found = pipeline.status(str(dataset))
    assert found.incomplete == [parts[0].stem, parts[1].stem]
    assert (found.shards, found.predicted) == (1, 9)


def test_what_is_gone_is_told_by_the_input_of_the_last_run_or_of_a_config(job: dict[str, Any], dataset: Path):
    shards = Path(job["input"]["url"])
    assert (pipeline.status(str(dataset)).gone, pipeline.status(str(dataset)).note) == ([], "")
    config = digits_config(shards / "digits-001.tar", dataset)
    gone = [shard_id(f"file://{shards}/digits-00{number}.tar") for number in (0, 2)]
    assert pipeline.status(str(dataset), config).gone == gone
    commit_all(config, "20260102T000000Z-aaaaaaaa")
    assert pipeline.status(str(dataset)).gone == gone, "the newest report is the last run's"


def without_reports(dataset: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    shutil.rmtree(dataset / "_runs")


def damaged_report(dataset: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    next((dataset / "_runs").rglob("report.json")).write_text("{")


def empty_listing(dataset: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    return digits_config(dataset / "nothing", dataset)


def store_that_is_down(dataset: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    storage = {"endpoint_url": "http://127.0.0.1:9", "deadline_s": 0.5}
    return digits_config("s3://raw/*.tar", dataset, input={"storage": storage})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_reports, "no report tells how they were made. Give --config."),
        (damaged_report, "status takes the config of the last run"),
        (empty_listing, "there is nothing to read under"),
        (store_that_is_down, "cannot list s3://raw"),
    ],
)
def test_an_input_that_cannot_be_listed_is_told_and_hides_nothing_else(
    make: Any, says: str, job: dict[str, Any], dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    found = pipeline.status(str(dataset), make(dataset, job))
    assert (found.shards, found.predicted, found.gone) == (3, 27, [])
    assert found.note.startswith("what is gone from the input is not known: ")
    assert says in found.note


def test_the_last_five_runs_newest_first(dataset: Path):
    report = json.loads((dataset / "_runs/20260101T000000Z-aaaaaaaa/report.json").read_text())
    for day in range(2, 9):
        folder = dataset / "_runs" / f"2026010{day}T000000Z-aaaaaaaa"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report | {"run_id": folder.name}))
    days = [run["run_id"][:8] for run in pipeline.status(str(dataset)).last_runs]
    assert days == ["20260108", "20260107", "20260106", "20260105", "20260104"]


def test_a_damaged_report_is_told_and_hides_nothing_else(dataset: Path):
    (dataset / "_runs/20260101T000000Z-aaaaaaaa/report.json").write_text('{"run_id": ')
    found = pipeline.status(str(dataset))
    assert found.predicted == 27
    assert found.last_runs[0]["run_id"] == "20260101T000000Z-aaaaaaaa"
    assert found.last_runs[0]["message"] == "its report.json cannot be read"


def test_a_damaged_mark_sends_to_verify(dataset: Path):
    next((dataset / "_ledger").iterdir()).write_text("{")
    with pytest.raises(FatalError, match=r"a mark in .*_ledger is damaged: .*`resnet-batch verify .*` names it"):
        pipeline.status(str(dataset))
    assert "is damaged or not ours" in str(pipeline.verify(str(dataset)))


def test_where_there_is_no_dataset(tmp_path: Path):
    with pytest.raises(NotFound, match="there is no dataset at"):
        pipeline.status(str(tmp_path))
