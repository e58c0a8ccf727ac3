"""What became of workers, as Ray knows it, and when a run gives up because they only die."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from pipeline import witness
from pipeline.deaths import Fate
from pipeline.errors import Stopped
from pipeline.witness import Casualties, RayNotes, Witness, fate_of


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)
class Worker:
    def process(self) -> tuple[str, int]:
        return witness._this_process(), os.getpid()

    def begin(self, notes: RayNotes, work: str, deaths: int, folder: Path) -> int:
        """What it is told when it begins the work, after it has died of it so many times."""
        told = notes.begin(work)
        (folder / f"{os.getpid()}").touch()
        if len(list(folder.iterdir())) <= deaths:
            signal.raise_signal(signal.SIGSEGV)
        return told


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_done_again_is_told_how_often_it_killed_but_for_the_first_time(tmp_path: Path) -> None:
    notes = RayNotes(ray.remote(num_cpus=0, max_concurrency=2)(Witness).remote())
    assert ray.get(Worker.remote().begin.remote(notes, "work", 3, tmp_path)) == 2
    (tmp_path / "other").mkdir()
    assert ray.get(Worker.remote().begin.remote(notes, "work", 0, tmp_path / "other")) == 0, "it is new to this one"
    (tmp_path / "third").mkdir()
    assert ray.get(Worker.remote().begin.remote(notes, "other work", 1, tmp_path / "third")) == 0, "it has not killed"


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_is_killed_is_dead_and_one_that_lives_is_not() -> None:
    worker = Worker.remote()
    process, pid = ray.get(worker.process.remote())
    assert fate_of(process) is Fate.ALIVE
    os.kill(pid, signal.SIGSEGV)
    assert ray.get(worker.process.remote())[0] != process
    assert fate_of(process) is Fate.DEAD


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_whose_node_is_gone_is_excused() -> None:
    process, _ = ray.get(Worker.remote().process.remote())
    assert fate_of("ab" * 28 + process[56:]) is Fate.EXCUSED


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_was_told_to_end_is_excused() -> None:
    worker = Worker.remote()
    process, _ = ray.get(worker.process.remote())
    ray.kill(worker)
    assert fate_of(process) is Fate.EXCUSED


@pytest.mark.parametrize(
    ("deaths", "stalled_s", "stops"),
    [
        ({"memory": 5}, 61, "memory monitor killed 5 workers"),
        ({"memory": 4}, 61, None),
        ({"memory": 50}, 59, None),
        ({"other": 100}, 61, "100 workers died"),
        ({"other": 99}, 61, None),
    ],
)
def test_a_run_gives_up_after_a_minute_of_nothing_but_deaths(
    deaths: dict[str, int], stalled_s: float, stops: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, dead = [1000.0], Counter(memory=7, other=7)  # of before
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(witness, "_deaths_of_this_job", lambda: Counter(dead))
    casualties = Casualties()
    casualties.on_progress()
    now[0] += witness.LOOK_EVERY_S
    casualties.check()
    dead.update(deaths)
    now[0] += stalled_s - witness.LOOK_EVERY_S
    if stops is None:
        casualties.check()
    else:
        with pytest.raises(Stopped, match=stops):
            casualties.check()
        casualties.on_progress()
        now[0] += witness.LOOK_EVERY_S
        casualties.check()  # a block arrived: the count begins anew
