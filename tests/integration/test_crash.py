"""Ends that come to the driver: killed with a Ray of its own, told to stop, and two of them on one output.

Deaths of everything else are in `test_chaos.py`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import pipeline
from pipeline.errors import ExitCode
from tests.support.arena import SHARDS, job_config, make_shards, start_run
from tests.support.chaos import PROCESS, wait_for_parts
from tests.support.soundness import Expected, OnDisk, violations


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Expected]:
    """Shards, and the rows of a run over them that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_shards(folder / "shards")
    config = config_for(folder / "shards", folder)
    pipeline.run(config)
    return folder / "shards", Expected.of(config)


def config_for(shards: Path, folder: Path, address: str | None = None) -> dict[str, Any]:
    address = address or ray.get_runtime_context().gcs_address
    return job_config(shards, folder / "labels", address)


def assert_whole(config: dict[str, Any], expected: Expected) -> None:
    assert violations(config, OnDisk(Path(config["output"]["url"])), expected) == []


def test_in_local_mode_the_driver_takes_its_ray_with_it(undisturbed: tuple[Path, Expected], tmp_path: Path) -> None:
    shards, expected = undisturbed
    config = config_for(shards, tmp_path, address="local")
    driver = start_run(config, tmp_path)
    assert wait_for_parts(driver, tmp_path / "labels", 3)
    ours = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    workers = [process for process in ours if process.name().startswith("ray::Map")]
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in ours:  # two of Ray's agents outlive a driver that was killed
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive
    assert pipeline.run(config_for(shards, tmp_path)).exit_code == ExitCode.COMPLETE
    assert_whole(config, expected)


def test_sigterm_keeps_what_is_committed_and_says_incomplete(
    undisturbed: tuple[Path, Expected], tmp_path: Path
) -> None:
    """While the one predictor is stuck, so that the run cannot be through before the signal."""
    shards, expected = undisturbed
    config = config_for(shards, tmp_path)
    driver = start_run(config, tmp_path)
    assert wait_for_parts(driver, tmp_path / "labels", 2)
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith(PROCESS["predictor"][:15]):
            process.suspend()
    driver.terminate()
    assert driver.wait(60) == ExitCode.INCOMPLETE
    assert 2 <= len(list((tmp_path / "labels/data").iterdir())) < SHARDS
    assert "Run again" in (tmp_path / "driver.log").read_text()
    assert pipeline.verify(str(tmp_path / "labels")).ok
    assert pipeline.run(config).exit_code == ExitCode.COMPLETE
    assert_whole(config, expected)


def test_two_runs_at_once_end_in_one_dataset(undisturbed: tuple[Path, Expected], tmp_path: Path) -> None:
    shards, expected = undisturbed
    config = config_for(shards, tmp_path)
    both = [start_run(config, tmp_path, name=name) for name in ("driver", "rival")]
    codes = [driver.wait(120) for driver in both]
    assert set(codes) <= {ExitCode.COMPLETE, ExitCode.INCOMPLETE}
    assert pipeline.run(config).exit_code == ExitCode.COMPLETE
    assert_whole(config, expected)
