"""Runs that end before they are through: by an error budget, a signal, a full disk, or for want of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
from ray.data import DataContext

import pipeline
from pipeline.cluster import Cluster
from pipeline.config import make_config
from pipeline.driver import Run
from pipeline.errors import ConfigError, ExitCode, FatalError, Stopped
from pipeline.failures import readable
from pipeline.inputs.shards import Shard, shard_id
from pipeline.outputs.commit import CommitContext
from pipeline.outputs.dataset import Dataset
from pipeline.planning import Task
from pipeline.report import Counter, RunReport
from pipeline.rows import Columns
from pipeline.storage import Store
from tests.support.arena import start_run
from tests.support.disks import small_disk
from tests.support.jobs import NOOP, assert_exactly_once, assert_no_leftovers, digits_config, digits_tars


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("limit", [{"max_errors": 5}, {"max_error_rate": 0.05}])
def test_a_rotten_source_stops_the_run(limit: dict[str, float], tmp_path: Path) -> None:
    digits_tars(tmp_path / "shards", 12, 20, broken=range(10))
    config = digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP)
    report = pipeline.run(config | {"input": config["input"] | limit})
    assert report.exit_code == ExitCode.INCOMPLETE
    assert "samples so far are error rows" in report.message
    assert "Run again" in report.message
    assert report.shards_committed + len(report.open) == 12
    assert report.shards_committed < 12
    pipeline.run(config)
    assert_exactly_once(tmp_path / "labels", 12 * 20)


@pytest.mark.usefixtures("ray_cluster")
def test_a_small_rotten_source_stops_the_run(tmp_path: Path) -> None:
    """And its next one: it is never called complete."""
    digits_tars(tmp_path / "shards", 2, 10, broken=range(3))
    config = digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP)
    for _ in range(2):
        report = pipeline.run(config | {"input": config["input"] | {"max_error_rate": 0.2}})
        assert report.exit_code == ExitCode.INCOMPLETE
        assert "more than input.max_error_rate=0.2" in report.message
        assert report.shards_done_before + report.shards_committed < 2


@pytest.mark.usefixtures("ray_cluster")
def test_within_the_budget_nothing_stops(tmp_path: Path) -> None:
    digits_tars(tmp_path / "shards", 3, 20, broken=[3])
    config = digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP)
    report = pipeline.run(config | {"input": config["input"] | {"max_errors": 3, "max_error_rate": 0.05}})
    assert (report.exit_code, report.errors) == (ExitCode.COMPLETE, 3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    digits_tars(tmp_path / "shards", 12, 40)
    with small_disk(tmp_path) as disk:
        (disk / "full").write_bytes(bytes(2**20 - 60_000))
        config = digits_config(tmp_path / "shards", disk / "labels", **NOOP)
        started = time.monotonic()
        report = pipeline.run(config)
        assert report.exit_code == ExitCode.INCOMPLETE
        assert time.monotonic() - started < 60
        assert "No space left on device" in report.message
        assert "Free space and run again" in report.message
        assert report.shards_committed + len(report.open) == 12, "no shard is reported twice"
        assert_no_leftovers(disk / "labels")
        (disk / "full").unlink()
        assert pipeline.run(config).exit_code == ExitCode.COMPLETE
        assert_exactly_once(disk / "labels", 12 * 40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_everything_starts(number: int, tmp_path: Path) -> None:
    """Also while Ray starts, which has a handler of its own that exits with another code."""
    digits_tars(tmp_path / "shards", 2, 10)
    run = start_run(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP), tmp_path)
    wait_until(lambda: bool(psutil.Process(run.pid).children()), run)  # the first of Ray's processes
    run.send_signal(number)
    assert run.wait(60) == ExitCode.INCOMPLETE
    assert "run again" in (tmp_path / "driver.log").read_text().lower()


@pytest.mark.slow
def test_a_node_without_memory_ends_the_run_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's memory monitor kills whatever works, and Ray starts it again for ever."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    digits_tars(tmp_path / "shards", 2, 10)
    run = start_run(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP), tmp_path)
    assert run.wait(240) == ExitCode.INCOMPLETE
    assert "memory monitor killed" in (tmp_path / "driver.log").read_text()


@ray.remote(max_retries=0, num_cpus=0)
def raises(error: Exception) -> None:
    raise error


@ray.remote(max_retries=0, num_cpus=0)
def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(num_cpus=0)
class Unmade:
    def __init__(self) -> None:
        raise RuntimeError("odd")

    def ready(self) -> None: ...


@ray.remote(max_retries=0, num_cpus=0)
def wraps(error: Exception, origin: Exception | None = None) -> None:
    """As Ray Data does with what a callable class raises."""
    try:
        with contextlib.suppress(RuntimeError):
            raise origin or RuntimeError  # so that it has a traceback
        raise error from origin
    except Exception as cause:
        raise ray.exceptions.UserCodeException("UDF failed to process a data block.") from cause


def unmade() -> Any:
    return Unmade.remote().ready.remote()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("begin", "kind", "says"),
    [
        (lambda: raises.remote(ray.exceptions.OutOfDiskError("Local disk is full")), Stopped, "Free space there"),
        (
            lambda: raises.remote(ray.exceptions.StreamingGeneratorReplayInconsistentError("2 objects, not 4")),
            Stopped,
            "a shard that it had read was another one",
        ),
        (lambda: raises.remote(RuntimeError("CUDA error")), Stopped, "a worker failed with RuntimeError: CUDA error"),
        (lambda: raises.remote(ConfigError("no such engine")), ConfigError, "no such engine"),
        (lambda: wraps.remote(FatalError("no memory. Use another.")), FatalError, "no memory. Use another."),
        (lambda: wraps.remote(FatalError("too small"), RuntimeError("mat1")), FatalError, "too small"),
        (
            lambda: wraps.remote(RuntimeError("mat1 and mat2\nNote: shapes")),
            Stopped,
            "a worker failed with RuntimeError: mat1 and mat2. --debug shows where",
        ),
        (dies.remote, Stopped, "a worker died. Often that is for want of memory"),
        (
            unmade,
            Stopped,
            "a worker failed with RuntimeError: odd",
        ),
    ],
)
def test_what_ray_says_of_failures_becomes_a_sentence(begin: Callable[[], Any], kind: type, says: str) -> None:
    with pytest.raises(ray.exceptions.RayError) as raised:
        ray.get(begin())
    found = readable(raised.value)
    assert type(found) is kind
    assert says in str(found)


def test_a_cluster_that_is_not_there_is_a_sentence_at_once(tmp_path: Path) -> None:
    """Ray itself would try for a quarter of an hour."""
    digits_tars(tmp_path / "shards", 1, 2)
    config = digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP)
    run = start_run(config | {"runtime": config["runtime"] | {"address": "127.0.0.1:1"}}, tmp_path)
    assert run.wait(60) == ExitCode.FAILED
    assert "cannot connect to 127.0.0.1:1" in (tmp_path / "driver.log").read_text()


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_which_nothing_moves_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where others hold all CPUs."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 3)
    digits_tars(tmp_path / "shards", 2, 2)
    other = ray.remote(num_cpus=2)(lambda: time.sleep(60)).remote()
    try:
        report = pipeline.run(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))
    finally:
        ray.cancel(other, force=True)
    assert report.exit_code == ExitCode.INCOMPLETE
    assert "nothing has moved for 0 minutes: others may hold the cluster's CPUs" in (report.message or "")
    assert len(list((tmp_path / "labels/_runs").glob("*/report.json"))) == 1


def idle_run(folder: Path, watcher: Counter, shards: Sequence[str] = ()) -> Run:
    """Over shards that nobody reads."""
    tasks = [Task(Shard(url, shard_id(url), "webdataset", "0", 1)) for url in shards]
    context = CommitContext(Dataset(str(folder), Store()), {}, Columns(5, "float16", 4), "noop")
    return Run(tasks, make_config(digits_config(folder, folder)), context, Cluster(1, 2, 0), watcher)


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_signal_while_a_run_ends_hides_no_shard_that_is_open(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    class Impatient(Counter):
        def on_tick(self) -> None:
            raise KeyboardInterrupt

    counter = Impatient(RunReport("1", ""), 1, 1)
    run = idle_run(tmp_path, counter, ["file:///a.tar"])
    with pytest.raises(KeyboardInterrupt):
        run.loop(lambda: (iter(lambda: time.sleep(0.1), None), interrupted))
    assert [shard["shard"] for shard in counter.report.open] == ["file:///a.tar"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_committer_that_dies_of_a_block_again_and_again_stops_the_run(tmp_path: Path) -> None:
    block = ray.put(pa.table({}))

    @ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1)
    class Mortal:
        def describe(self, _: pa.Table) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    run = idle_run(tmp_path, Counter(RunReport("1", ""), 0, 0))
    run._committers = [Mortal.remote()]
    bundle = SimpleNamespace(blocks=[SimpleNamespace(ref=block)])
    with pytest.raises(Stopped, match=r"finished rows cannot be read: a worker died"):
        run.loop(lambda: (iter([bundle]), lambda: None))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("starting", [True, False], ids=["while it starts", "while it works"])
def test_an_execution_that_is_stopped_is_ended(starting: bool, tmp_path: Path) -> None:
    """In a notebook it would otherwise keep its actors. Here it takes its time to start, and ends when it is told to."""
    begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def execute() -> tuple[Iterator[Any], Callable[[], None]]:
        begun.set()
        if starting:
            goes_on.wait(10)
        return iter(lambda: ended.wait(10) and None, None), ended.set

    class Impatient(Counter):
        def on_tick(self) -> None:
            begun.wait(10)
            threading.Timer(0.3, goes_on.set).start()
            raise KeyboardInterrupt

    run = idle_run(tmp_path, Impatient(RunReport("1", ""), 0, 0))
    with pytest.raises(KeyboardInterrupt):
        run.loop(execute)
    assert ended.wait(5)
