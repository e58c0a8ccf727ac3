"""The same run on a real head with a real S3 server: by `ray job submit`, by `submit`, on logical GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

import pipeline
from pipeline.config import make_config
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store
from tests.support.arena import start_run
from tests.support.head import Head, clean_environment, ray_head
from tests.support.jobs import NOOP, WEIGHTS, digits_config, digits_tars
from tests.support.s3 import S3Server, s3_server

ROOT = Path(__file__).parents[2]
SHARDS, PER_SHARD = 6, 40


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server() as server:
        client = server.client(server.owner)
        for path in digits_tars(tmp_path_factory.mktemp("shards"), SHARDS, PER_SHARD, broken=[1]):
            client.put_object(Bucket="raw", Key=f"digits/{path.name}", Body=path.read_bytes())
        yield server


@pytest.fixture(scope="module")
def head(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The cluster has the job's identity in its environment, as nodes with an instance role have."""
    environment = clean_environment() | s3.environment(s3.job)
    # Ray's sockets lie below its folder, and their paths must be short.
    with ray_head(tmp_path_factory.mktemp("h"), environment, num_gpus=2) as started:
        yield started


@pytest.fixture(autouse=True)
def as_the_job(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.become(monkeypatch, s3.job)


def config_for(s3: S3Server, output: str, **sections: Any) -> dict[str, Any]:
    storage = {"endpoint_url": s3.endpoint_url}
    return digits_config("s3://raw/digits/*.tar", f"s3://labels/{output}", storage=storage, **sections)


def dataset_rows(s3: S3Server, output: str) -> pa.Table:
    config = make_config(config_for(s3, output))
    return pipeline.read(f"s3://labels/{output}", config=config).sort_by(
        [("shard", "ascending"), ("index", "ascending")]
    )


def last_report(s3: S3Server, output: str) -> dict[str, Any]:
    store = Store(make_config(config_for(s3, output)).output_storage)
    dataset = Dataset(f"s3://labels/{output}", store)
    urls = sorted(file.url for file in store.find(dataset.path("_runs")))
    report: dict[str, Any] = json.loads(store.read(urls[-1]))
    return report


def test_ray_job_submit_labels_tars_in_a_bucket(s3: S3Server, head: Head):
    overrides = [
        *(
            "input.url=s3://raw/digits/*.tar",
            "output.url=s3://labels/by-ray",
            "runtime.engine=eager",
            "runtime.device=cpu",
        ),
        *("model.name=pipeline.examples.network:digits_resnet20", f"model.weights={WEIGHTS}"),
        "model.transform={resize: 32, crop: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
        f"storage.endpoint_url={s3.endpoint_url}",
    ]
    ray = Path(sys.executable).with_name("ray")
    command = [
        ray,
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--working-dir",
        ROOT,
        "--",
        "python",
        "jobs/label.py",
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using the cluster that runs it" in done.stdout
    rows = dataset_rows(s3, "by-ray")
    assert rows.num_rows == SHARDS * (PER_SHARD - 1)
    assert "embedding" not in rows.column_names
    assert pipeline.verify("s3://labels/by-ray", config=make_config(config_for(s3, "by-ray"))).ok


def test_submit_follows_the_log_to_the_end_and_can_be_asked_again(
    s3: S3Server, head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With a network in a file beside the config, which travels with all that it imports. A job that ends otherwise is
    in `test_secrets.py`."""
    (tmp_path / "my_layers.py").write_text("from pipeline.examples.network import digits_resnet20 as network\n")
    (tmp_path / "my_network.py").write_text("from my_layers import network\n\ndef build():\n    return network(10)\n")
    path = tmp_path / "job.yaml"
    model = {"name": "my_network:build", "classes": [f"digit {n}" for n in range(10)]}
    path.write_text(yaml.safe_dump(config_for(s3, "by-us", model=model)))
    command = [sys.executable, "-m", "pipeline", "submit", str(path), "--address", head.dashboard]
    command += ["--submission-id", "nightly-2026-11-24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 committed" in done.stdout
    report = last_report(s3, "by-us")
    assert report["actors"] == 2, "one actor per logical GPU"
    assert (report["predicted"], report["errors"]) == (SHARDS * (PER_SHARD - 1), SHARDS)

    assert pipeline.submit(path, head.dashboard, submission_id="nightly-2026-11-24") == 0
    again = capsys.readouterr()
    assert "job nightly-2026-11-24" in again.err
    assert "6 committed" in again.out
    store = Store(make_config(config_for(s3, "by-us")).output_storage)
    reports = store.find("s3://labels/by-us/_runs")
    assert len(reports) == 1, "the second submission followed the first instead of starting another run"


def test_both_ways_give_the_same_rows(s3: S3Server):
    ours, rays = (dataset_rows(s3, name) for name in ("by-us", "by-ray"))
    assert ours.select(["key", "class_id"]).equals(rays.select(["key", "class_id"]))
    assert ours["label"].to_pylist() == [f"digit {label}" for label in rays["label"].to_pylist()]


def test_a_driver_joins_a_head_that_listens_on_loopback_alone(head: Head, tmp_path: Path):
    """Ray replaces a loopback address by an outside one, where such a head does not answer."""
    digits_tars(tmp_path / "shards", 1, 3)
    noop = {"runtime": {"engine": "noop", "device": "cpu", "batch_size": 8, "address": head.gcs}}
    random = {"model": {"name": "resnet18", "weights": "random"}}
    config = digits_config(tmp_path / "shards", tmp_path / "labels", **noop, **random)
    assert start_run(config, tmp_path).wait(90) == 0, (tmp_path / "driver.log").read_text()


# Two runs in threads, each in a dataset of its own; prints what they end with, and whether Ray is left behind.
TWO_RUNS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import ray
import pipeline
with ThreadPoolExecutor(2) as threads:
    reports = list(threads.map(pipeline.run, map(json.loads, sys.argv[1:])))
print(*(int(report.exit_code) for report in reports), ray.is_initialized())
"""


def test_two_runs_of_one_process_share_its_ray(tmp_path: Path):
    """The second one is longer: it would otherwise lose Ray with the end of the first."""
    configs = []
    for name, shards in (("short", 2), ("long", 12)):
        digits_tars(tmp_path / name, shards, 20)
        configs.append(digits_config(tmp_path / name, tmp_path / f"{name}-labels", **NOOP))
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, *map(json.dumps, configs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip() == "0 0 False", done.stderr
