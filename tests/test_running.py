"""How a run ends, where what it committed stands."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.errors import AccessDenied, ExitCode, StoreUnavailable
from pipeline.estimation import PREDICTION
from pipeline.outputs.dataset import Dataset
from pipeline.planning import Plan
from pipeline.report import RunReport
from pipeline.running import _conclude, _leave, _score
from pipeline.storage import Store


@pytest.mark.parametrize("failure", [AccessDenied("expired"), StoreUnavailable("down")])
def test_a_store_that_fails_after_the_last_commit_fails_no_run(
    failure: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Store):
        def read(self, url: str, version: str | None = None) -> bytes:
            raise failure

        def put(self, url: str, data: bytes | Path) -> str:
            raise failure

    dataset, report = Dataset(str(tmp_path), Failing()), RunReport("run", str(tmp_path))
    report.usage = {"cores": 1, "actors": 1}
    caplog.set_level(logging.WARNING)
    assert _score(report, Plan([]), dataset, 1.0) == {}
    _leave(report, dataset, 0.0)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the prediction is not scored",
        "this run leaves no report.json",
    ]


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}"])
def test_a_damaged_prediction_is_not_scored(text: str, tmp_path: Path) -> None:
    dataset = Dataset(str(tmp_path), Store())
    dataset.store.put(dataset.path(*PREDICTION), text.encode())
    assert _score(RunReport("run", str(tmp_path)), Plan([]), dataset, 1.0) == {}


def test_a_run_is_complete_only_if_every_shard_is_committed() -> None:
    """Whatever became of the list of those that stay open."""
    report = RunReport("run", "labels", shards_listed=9, shards_done_before=6, shards_committed=2, predicted=10)
    _conclude(report)
    assert (report.exit_code, report.message[:47]) == (
        ExitCode.INCOMPLETE,
        "2 of 3 shards committed, 1 left open. Run again",
    )
