"""Where a job is submitted to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

import pipeline
from pipeline import submission
from pipeline.config import load_config, make_config
from pipeline.errors import ConfigError, FatalError, Stopped
from tests.support.jobs import digits_config


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://ray.example/team", "https://ray.example/team"),
        ("head:8265", "http://head:8265"),
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_an_address_is_a_url_or_host_and_port(address: str, url: str):
    assert submission.dashboard(address) == url


@pytest.mark.parametrize(
    "address",
    ["", "nonsense", "8265", ":8265", "http://", "http://:8265", "http://127.0.0.1:abc", "ftp://x", "ray://head:10001",
     "[::1", "http://[::1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_before_ray_is_asked(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission, "_client", lambda address: pytest.fail("Ray is asked"))
    with pytest.raises(ConfigError, match="is not that of a Ray dashboard, such as http://head:8265"):
        pipeline.submit(digits_config("s3://raw/*.tar", "s3://labels/x"), address)


def test_weights_beside_the_config_are_found_from_the_folder_of_the_job(tmp_path: Path):
    beside = tmp_path / "net.safetensors"
    beside.write_bytes(b"")
    named = {"net.safetensors": str(beside), "/there/net.pth": "/there/net.pth", "s3://m/net.pth": "s3://m/net.pth"}
    for weights, expected in named.items():
        config = digits_config("s3://raw/*.tar", "s3://labels/x", model={"weights": weights})
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
        with TemporaryDirectory() as folder:
            submission.pack(load_config(tmp_path / "job.yaml"), Path(folder))
            assert load_config(Path(folder, "config.yaml")).model.weights == expected


def test_weights_that_are_nowhere_are_not_submitted(tmp_path: Path):
    config = digits_config("s3://raw/*.tar", "s3://labels/x", model={"weights": "net.safetensors"})
    with pytest.raises(ConfigError, match="model.weights: there is no file"):
        submission.pack(make_config(config), tmp_path)


def test_ctrl_c_ends_the_following_and_says_that_the_job_runs_on():
    """In a process of its own, as in `test_cluster.py`."""
    code = """
import asyncio, os, signal
from pipeline import submission

class Client:
    async def tail_job_logs(self, job):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        yield ""

submission.follow(Client(), "raysubmit_1")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr.splitlines()[-1].startswith(
        "pipeline.errors.Stopped: no longer following job raysubmit_1, which runs on: `ray job logs"
    )


def test_a_host_that_cannot_be_is_a_sentence():
    with pytest.raises(FatalError, match=r"cannot submit to the Ray dashboard at http://a\.\.b:8265"):
        pipeline.submit(digits_config("s3://raw/*.tar", "s3://labels/x"), "http://a..b:8265")


def job_info(status: str, exit_code: int | None = None) -> Any:
    return SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code, message="so it was")


class Dashboard:
    """Shows a log of two lines, and drops the connection as often as it says: by an error, or without one."""

    def __init__(self, drops: Sequence[Exception | None], infos: Sequence[Any]) -> None:
        self.drops, self.infos = list(drops), list(infos)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.drops:
            error = self.drops.pop(0)
            if error is not None:
                raise error
            return
        yield "two\n"

    def get_job_info(self, job: str) -> Any:
        return self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(seconds: float) -> None: ...

    monkeypatch.setattr(submission.asyncio, "sleep", sleep)


@pytest.mark.usefixtures("at_once")
def test_a_connection_that_drops_is_opened_again(capsys: pytest.CaptureFixture[str]):
    drops = [RuntimeError("closed"), ConnectionRefusedError("refused"), ClientError("no handshake"), None]
    client = Dashboard(drops, [job_info("RUNNING"), job_info("SUCCEEDED", 0)])
    assert submission.follow(client, "job") == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize("error", [ClientError("gone"), AuthenticationError("gone")])
@pytest.mark.usefixtures("at_once")
def test_a_job_whose_log_is_lost_is_not_called_failed(error: Exception):
    client = Dashboard([error] * 100, [job_info("RUNNING")])
    with pytest.raises(Stopped, match=r"lost the log of job job: gone.* It may run on: `ray job logs"):
        submission.follow(client, "job")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("info", "exit_code"),
    [
        (job_info("SUCCEEDED", 0), 0),
        (job_info("FAILED", 2), 2),
        (job_info("FAILED", -9), 3),
        (job_info("FAILED", 137), 3),
        (job_info("STOPPED"), 3),
        (job_info("FAILED"), 1),
        (job_info("FAILED", 126), 1),
        (job_info("FAILED", 127), 1),
    ],
    ids=["complete", "refused", "killed", "killed in its shell", "stopped", "never ran", "not executable", "no python"],
)
def test_a_job_ends_with_an_exit_code_of_ours(info: Any, exit_code: int):
    assert submission.follow(Dashboard([], [info]), "job") == exit_code  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [AuthenticationError("401"), RuntimeError("status 500"), OSError("refused")])
def test_a_dashboard_that_takes_no_job_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(submission, "_client", lambda address: SimpleNamespace(submit_job=fail, list_jobs=fail))
    with pytest.raises(FatalError, match=r"cannot submit to the Ray dashboard at http://head:8265: .* RAY_AUTH_TOKEN"):
        pipeline.submit(digits_config("s3://raw/*.tar", "s3://labels/x"), "head:8265", submission_id="again")


def test_errors_are_tried_again_on_the_cluster_too(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def take(*, entrypoint: str, **_: object) -> str:
        asked.append(entrypoint)
        return "job"

    monkeypatch.setattr(submission, "_client", lambda address: SimpleNamespace(submit_job=take))
    config = digits_config("s3://raw/*.tar", "s3://labels/x")
    for retry_errors in ((), ["truncated, corrupt"]):
        assert pipeline.submit(config, "head:8265", wait=False, retry_errors=retry_errors) == "job"
    run = "python -m pipeline run config.yaml"
    assert asked == [run, f"{run} --retry-errors corrupt,truncated"]
    with pytest.raises(ConfigError, match="there is no error class 'corupt'; did you mean corrupt"):
        pipeline.submit(config, "head:8265", wait=False, retry_errors="corupt")
