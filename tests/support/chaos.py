"""Rounds of violence: start a run, kill something at an event, run again, compare with an undisturbed run.

Everything random comes from the seed, which is printed; the moment is an event (so many parts stand), not a sleep.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

VICTIMS = ("driver", "predictor", "decoder", "committer")
PROCESS = {"predictor": "ray::MapWorker", "decoder": "ray::Read_PixelSource", "committer": "ray::Committer"}
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Round:
    """What one round does, decided by its seed."""

    seed: int
    victim: str
    parts: int  # the kill comes as soon as so many parts stand
    delay_s: float  # and this long after, so that it hits any step of a commit

    @staticmethod
    def of(seed: int, num_shards: int) -> Round:
        choice = random.Random(seed)
        victim = choice.choice(VICTIMS)
        # Shards are decoded ahead: by the time that parts stand, the decoders may be through.
        parts = 0 if victim == "decoder" else choice.randrange(num_shards - 1)
        return Round(seed, victim, parts, choice.uniform(0, 0.5))


def start_run(config: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    """A driver in a process of its own, with its log in `folder`."""
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    log = (folder / "driver.log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "pipeline", "run", str(path)], stdout=log, stderr=log)


def wait_for_parts(driver: subprocess.Popen[bytes], output: Path, parts: int) -> bool:
    """True once so many parts stand and the run still goes on."""
    deadline = time.monotonic() + TIMEOUT_S
    while driver.poll() is None:
        if len(list(output.glob("data/*.parquet"))) >= parts:
            return True
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)
    return False


def processes(root_pid: int, name: str) -> Iterator[psutil.Process]:
    """Ray's processes below `root_pid` that run what `name` says."""
    for process in psutil.Process(root_pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(name):
                yield process
        except psutil.Error:
            continue


def kill(plan: Round, driver: subprocess.Popen[bytes], ray_root_pid: int) -> bool:
    """SIGKILL the victim of this round; False if the run was over before there was one."""
    if plan.victim == "driver":
        time.sleep(plan.delay_s)
        driver.kill()
        driver.wait()
        return True
    while driver.poll() is None:
        for process in processes(ray_root_pid, PROCESS[plan.victim]):
            time.sleep(plan.delay_s)
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            return True
        time.sleep(0.01)
    return False


def play(plan: Round, config: dict[str, Any], folder: Path, ray_root_pid: int) -> tuple[bool, list[int]]:
    """Run, kill, run again: whether the victim was hit, and both exit codes. One more run must be enough."""
    output = Path(config["output"]["url"])
    driver = start_run(config, folder)
    hit = wait_for_parts(driver, output, plan.parts) and kill(plan, driver, ray_root_pid)
    codes = [driver.wait(TIMEOUT_S)]
    again = start_run(config, folder)
    codes.append(again.wait(TIMEOUT_S))
    return hit, codes
