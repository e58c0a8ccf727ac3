"""Where a job is submitted to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

import pipeline
from pipeline import submission
from pipeline.config import load_config, make_config
from pipeline.errors import ConfigError, FatalError
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
    with pytest.raises(FatalError, match="cannot reach the Ray dashboard at http://a..b:8265"):
        submission._client("http://a..b:8265")
