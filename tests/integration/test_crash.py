"""SIGKILL to the driver, to a decode worker, to the predictor, to the committer: the next run makes it whole."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray

import pipeline
from pipeline.errors import ExitCode
from tests.support.chaos import Round, kill, play, start_run, wait_for_parts
from tests.support.jobs import assert_exactly_once, assert_no_leftovers, digits_config, digits_tars, rows

SHARDS, PER_SHARD = 30, 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, pa.Table]:
    """Shards, and the rows of a run over them that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    digits_tars(folder / "shards", SHARDS, PER_SHARD, broken=[3], scale=40)
    pipeline.run(config_for(folder / "shards", folder))
    return folder / "shards", rows(folder / "labels")


def config_for(shards: Path, folder: Path, **runtime: Any) -> dict[str, Any]:
    address = ray.get_runtime_context().gcs_address
    settings = {"address": address, "engine": "eager", "batch_size": 16} | runtime
    return digits_config(
        shards, folder / "labels", runtime=settings, model={"name": "tests.support.slow_network:build"}
    )


def assert_whole(output: Path, expected: pa.Table) -> None:
    assert rows(output).equals(expected), "the rows are those of the undisturbed run, bit for bit"
    assert_exactly_once(output, SHARDS * PER_SHARD)
    assert_no_leftovers(output)


@pytest.mark.parametrize("victim", ["driver", "predictor", "decoder", "committer"])
def test_a_kill_loses_nothing_and_doubles_nothing(
    victim: str, undisturbed: tuple[Path, pa.Table], tmp_path: Path
) -> None:
    shards, expected = undisturbed
    plan = Round(seed=0, victim=victim, parts=0 if victim == "decoder" else 5, delay_s=0.05)
    hit, codes = play(plan, config_for(shards, tmp_path), tmp_path, os.getpid())
    assert hit
    assert codes[0] == (-signal.SIGKILL if victim == "driver" else ExitCode.COMPLETE), (
        tmp_path / "driver.log"
    ).read_text()
    assert codes[-1] == ExitCode.COMPLETE
    assert_whole(tmp_path / "labels", expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("CHAOS_ROUNDS", "100"))))
def test_chaos(seed: int, undisturbed: tuple[Path, pa.Table], tmp_path: Path) -> None:
    """CHAOS_ROUNDS=300 python -m pytest tests/integration/test_crash.py -m slow"""
    shards, expected = undisturbed
    plan = Round.of(seed, SHARDS)
    print(plan, play(plan, config_for(shards, tmp_path), tmp_path, os.getpid()))
    assert_whole(tmp_path / "labels", expected)
    shutil.rmtree(tmp_path)


def test_in_local_mode_the_driver_takes_its_ray_with_it(undisturbed: tuple[Path, pa.Table], tmp_path: Path) -> None:
    shards, expected = undisturbed
    config = config_for(shards, tmp_path, address="local")
    driver = start_run(config, tmp_path)
    assert wait_for_parts(driver, tmp_path / "labels", 3)
    ours = psutil.Process(driver.pid).children(recursive=True)
    kill(Round(0, "driver", 3, 0.0), driver, driver.pid)
    workers = [process for process in ours if process.name().startswith("ray::Map")]
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in psutil.wait_procs(ours, timeout=5)[1]:
        process.kill()  # two of Ray's agents outlive a driver that was killed
    assert not alive
    assert start_run(config, tmp_path).wait(120) == ExitCode.COMPLETE
    assert_whole(tmp_path / "labels", expected)


def test_sigterm_commits_what_is_complete_and_says_incomplete(
    undisturbed: tuple[Path, pa.Table], tmp_path: Path
) -> None:
    shards, expected = undisturbed
    config = config_for(shards, tmp_path)
    driver = start_run(config, tmp_path)
    assert wait_for_parts(driver, tmp_path / "labels", 2)
    driver.terminate()
    assert driver.wait(60) == ExitCode.INCOMPLETE
    assert 2 <= len(list((tmp_path / "labels/data").iterdir())) < SHARDS
    assert "Run again" in (tmp_path / "driver.log").read_text()
    assert pipeline.verify(str(tmp_path / "labels")).ok
    assert start_run(config, tmp_path).wait(120) == ExitCode.COMPLETE
    assert_whole(tmp_path / "labels", expected)


def test_two_runs_at_once_end_in_one_dataset(undisturbed: tuple[Path, pa.Table], tmp_path: Path) -> None:
    shards, expected = undisturbed
    config = config_for(shards, tmp_path)
    (tmp_path / "second").mkdir()
    both = [start_run(config, tmp_path), start_run(config, tmp_path / "second")]
    codes = [driver.wait(120) for driver in both]
    assert set(codes) <= {ExitCode.COMPLETE, ExitCode.INCOMPLETE}
    assert start_run(config, tmp_path).wait(120) == ExitCode.COMPLETE
    assert_whole(tmp_path / "labels", expected)
