"""Whole runs on a bucket behind a line that fails: for a while, for good, for one shard."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

import pipeline
from pipeline.config import make_config
from pipeline.errors import AccessDenied, ConfigError, ExitCode, PipelineError, StoreUnavailable
from pipeline.report import RunReport
from tests.support.jobs import digits_config, digits_tars
from tests.support.relay import Relay, relay
from tests.support.s3 import S3Server, s3_server

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHARDS, PER_SHARD = 6, 20
MIXED = ("reset", "500", "503", "slowdown", "409", "commit_then_reset", "truncate", "midreset", "hang")
SEED = 20261124
DEADLINE_S = 3.0
IN_TIME_S = 120.0  # of which most is for starting a run on a busy machine


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(for_all=True) as server:
        client = server.client(server.owner)
        for path in digits_tars(tmp_path_factory.mktemp("shards"), SHARDS, PER_SHARD, broken=[1]):
            client.put_object(Bucket="raw", Key=f"digits/{path.name}", Body=path.read_bytes())
        yield server


@pytest.fixture
def line(s3: S3Server) -> Iterator[Relay]:
    with relay(s3.endpoint_url, SEED) as found:
        yield found


def config_for(endpoint_url: str, output: str, **storage: Any) -> dict[str, Any]:
    """Whoever shows no keys may do what the job may, so that the workers of a shared cluster can."""
    storage = {"endpoint_url": endpoint_url, "options": {"anon": True}, "read_timeout_s": 1.0, **storage}
    return digits_config("s3://raw/digits/*.tar", f"s3://labels/{output}", storage=storage)


def run_behind(line: Relay, output: str, deadline_s: float = DEADLINE_S, **storage: Any) -> RunReport:
    return pipeline.run(config_for(line.url, output, deadline_s=deadline_s, **storage))


def everything(s3: S3Server, output: str) -> list[pa.Table]:
    """Rows and error rows."""
    config = make_config(config_for(s3.endpoint_url, output))
    tables = [pipeline.read(f"s3://labels/{output}", errors=errors, config=config) for errors in (False, True)]
    return [table.sort_by([("shard", "ascending"), ("index", "ascending")]) for table in tables]


def assert_sound(s3: S3Server, output: str) -> None:
    """The ledger balances, and nobody left an upload open."""
    found = pipeline.verify(f"s3://labels/{output}", config=make_config(config_for(s3.endpoint_url, output)))
    assert found.ok, str(found)
    assert "Uploads" not in s3.client(s3.owner).list_multipart_uploads(Bucket="labels")


@pytest.fixture(scope="module")
def clean(s3: S3Server) -> list[pa.Table]:
    """What an undisturbed run gives."""
    assert pipeline.run(config_for(s3.endpoint_url, "clean")).exit_code == ExitCode.COMPLETE
    return everything(s3, "clean")


def test_one_request_in_ten_fails_and_nobody_notices(s3: S3Server, line: Relay, clean: list[pa.Table]):
    for kind in MIXED:
        line.spoil(".*", kind, times=None, rate=0.1 / len(MIXED))
    report = run_behind(line, "mixed", deadline_s=60.0)
    assert (report.exit_code, report.open) == (ExitCode.COMPLETE, []), line.spoiled
    assert len(line.spoiled) > 0.04 * len(line.asked), "the test tested something"
    assert everything(s3, "mixed") == clean
    assert_sound(s3, "mixed")
    line.heal()
    assert run_behind(line, "mixed").shards_done_before == SHARDS, "and there is nothing left to do"


SPOILED = {"001": "denied", "002": "500", "003": "midhang", "004": "flip"}  # kinds of fault by shard


def test_shards_that_cannot_be_had_stay_open_and_harm_no_other(s3: S3Server, line: Relay, clean: list[pa.Table]):
    for number, kind in SPOILED.items():
        methods = "GET" if kind in ("midhang", "flip") else ".*"
        line.spoil(methods, kind, times=None, path=f"/digits-{number}.tar")
    began = time.monotonic()
    report = run_behind(line, "partly")
    assert time.monotonic() - began < IN_TIME_S
    assert (report.exit_code, report.shards_committed) == (ExitCode.INCOMPLETE, SHARDS - len(SPOILED))
    reasons = {entry["shard"]: entry["reason"] for entry in report.open}
    assert reasons.keys() == {f"s3://raw/digits/digits-{number}.tar" for number in SPOILED}
    for number, kind in SPOILED.items():
        url = f"s3://raw/digits/digits-{number}.tar"
        assert url in reasons[url]
        assert ("Check the credentials" if kind == "denied" else "un again") in reasons[url]
    assert_sound(s3, "partly")
    line.heal()
    report = run_behind(line, "partly")
    assert (report.exit_code, report.shards_committed) == (ExitCode.COMPLETE, len(SPOILED))
    assert everything(s3, "partly") == clean


def test_a_store_that_goes_down_in_the_middle_ends_the_run_with_a_sentence(s3: S3Server, line: Relay):
    line.spoil("PUT", "hook", path="/data/", hook=lambda: line.spoil(".*", "500", times=None))
    began = time.monotonic()
    report = run_behind(line, "down", deadline_s=1.5, connect_timeout_s=2.0)
    assert (report.exit_code, report.shards_committed, len(report.open)) == (ExitCode.INCOMPLETE, 0, SHARDS)
    assert all(re.search(r"s3://\S+: .*[Rr]un again when the store answers", entry["reason"]) for entry in report.open)
    assert time.monotonic() - began < IN_TIME_S
    found = pipeline.verify("s3://labels/down", config=make_config(config_for(s3.endpoint_url, "down")))
    assert all("not committed" in problem for problem in found.problems), "nothing is claimed that is not so"


@pytest.mark.parametrize(
    ("kind", "error", "code", "says"),
    [
        ("500", StoreUnavailable, ExitCode.INCOMPLETE, "Run again when the store answers"),
        ("hang", StoreUnavailable, ExitCode.INCOMPLETE, "Run again when the store answers"),
        ("reset", StoreUnavailable, ExitCode.INCOMPLETE, "Run again when the store answers"),
        ("expired", AccessDenied, ExitCode.FAILED, "have not expired"),
        ("denied", AccessDenied, ExitCode.FAILED, "cover this prefix"),
        ("no_bucket", ConfigError, ExitCode.USAGE, "Check the URL"),
    ],
)
@pytest.mark.parametrize("bucket", ["raw", "labels"])
def test_a_store_that_fails_from_the_start_is_said_in_time(
    line: Relay, bucket: str, kind: str, error: type[PipelineError], code: ExitCode, says: str
):
    line.spoil(".*", kind, times=None, path=f"^/{bucket}[/?]")
    began = time.monotonic()
    with pytest.raises(error, match=f"(?s)s3://{bucket}/.*{says}") as ended:
        run_behind(line, "never", deadline_s=1.0, **({"connect_timeout_s": 2.0} if kind == "hang" else {}))
    assert ended.value.exit_code == code
    assert time.monotonic() - began < IN_TIME_S / 2


def test_an_empty_listing_is_no_complete_run(s3: S3Server):
    config = config_for(s3.endpoint_url, "empty")
    config["input"]["url"] = "s3://raw/nothing/*.tar"
    with pytest.raises(ConfigError, match="nothing to read under s3://raw/nothing.*input.allow_empty") as ended:
        pipeline.run(config)
    assert ended.value.exit_code == ExitCode.USAGE
    config["input"]["allow_empty"] = True
    assert pipeline.run(config).exit_code == ExitCode.COMPLETE
