"""Rounds of violence: start a run, kill and suspend what a seed says, run once more, compare with an undisturbed run.

    python -m tests.support.chaos --rounds 100 --first-seed 0 --record chaos.jsonl

Everything random comes from the seed; the moment is an event (so many parts stand, a process has come up) and a
little later. Failed rounds are recorded, and what they left is kept; the recorder goes on.
"""

from __future__ import annotations

import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.arena import SHARDS, Arena, start_run
from tests.support.nodes import suspend
from tests.support.soundness import Reader, violations

TIMEOUT_S = 300.0
POLL_S = 0.02

PROCESS = {
    "reader": "ray::Read_Shards",
    "predictor": "ray::MapWorker",
    "committer": "ray::Committer",
    "gcs": "gcs_server",
    "node": "raylet",
}
# What is done to whom, and how often in a hundred.
DEEDS = {
    ("reader", "kill"): 14,
    ("predictor", "kill"): 16,
    ("committer", "kill"): 16,
    ("node", "kill"): 10,
    ("driver", "kill"): 14,
    ("reader", "suspend"): 4,
    ("predictor", "suspend"): 6,
    ("committer", "suspend"): 8,
    ("node", "suspend"): 4,
    ("driver", "suspend"): 4,
    ("gcs", "suspend"): 4,
}
APPEARS_LATE = {"reader", "predictor", "committer"}  # so that its coming up is in the middle of the work


@dataclass(frozen=True)
class Strike:
    """One deed, and when: as soon as the event has come, and `delay_s` later, so that it hits any step."""

    victim: str
    deed: str  # kill or suspend
    event: str  # `part` or `mark`: so many stand; `seen`: the victim has come up
    count: int
    delay_s: float
    seconds: float  # of a suspension
    choice: float  # which one, where there are several: 0 the first, 1 the last

    @staticmethod
    def of(rng: random.Random) -> Strike:
        victim, deed = rng.choices(list(DEEDS), list(DEEDS.values()))[0]
        # Shards are decoded ahead: by the time that parts stand, the readers may be through.
        is_early = victim == "reader" or (victim in APPEARS_LATE and rng.random() < 0.2)
        event = "seen" if is_early else rng.choice(["part", "mark"])
        count = 0 if is_early else 1 + int(rng.triangular(0, SHARDS - 2, 0))
        seconds = round(rng.uniform(0.5, 5.0), 2)
        return Strike(victim, deed, event, count, round(rng.uniform(0, 0.3), 3), seconds, rng.random())

    def __str__(self) -> str:
        what = f"{self.deed} {self.victim}" + (f" for {self.seconds} s" if self.deed == "suspend" else "")
        when = "once seen" if self.event == "seen" else f"at {self.event} {self.count}"
        return f"{what} {when} + {self.delay_s:.2f} s"


@dataclass(frozen=True)
class Round:
    """What one round does, decided by its seed."""

    seed: int
    strikes: tuple[Strike, ...]
    actors: int
    rival: float | None  # how long after the first driver a second one starts on the same output, if one does
    store: str  # disk, or s3 with faults

    @staticmethod
    def of(seed: int) -> Round:
        rng = random.Random(seed)
        store = "s3" if rng.random() < 0.15 else "disk"
        count = rng.choices([1, 2, 3], [60, 30, 10])[0]
        strikes = tuple(Strike.of(rng) for _ in range(count if store == "disk" else count - 1))
        rival = round(rng.choice([0.0, 0.0, rng.uniform(0, 4)]), 2) if rng.random() < 0.2 else None
        return Round(seed, strikes, 1 if rival is not None else rng.choice([1, 2]), rival, store)


@dataclass
class Outcome:
    hits: list[bool] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)  # of the disturbed drivers, and of the last run
    problems: list[str] = field(default_factory=list)
    looks: int = 0
    faults: int = 0  # of the store
    seconds: dict[str, float] = field(default_factory=dict)


class Struck:
    """A round under way: its drivers, and the strikes that wait for their moment."""

    def __init__(self, plan: Round, arena: Arena, folder: Path) -> None:
        self._plan, self._arena, self._folder = plan, arena, folder
        self._place = arena.place(folder, plan.store)
        self._config = arena.config(folder, plan.store, plan.actors)
        self.drivers: list[subprocess.Popen[bytes]] = []
        self._killed: set[int] = set()

    def run(self) -> list[bool]:
        """Until every driver has ended: which strikes have hit."""
        self._start("driver")
        with ThreadPoolExecutor(len(self._plan.strikes) + 1) as pool:
            hits = [pool.submit(self._strike, strike) for strike in self._plan.strikes]
            if self._plan.rival is not None:
                time.sleep(self._plan.rival)
                self._start("rival")
            deadline = time.monotonic() + TIMEOUT_S
            for driver in self.drivers:
                wait_or_kill(driver, deadline - time.monotonic())
            return [hit.result() for hit in hits]

    def unexpected(self) -> list[str]:
        """Exit codes that no strike explains."""
        allowed = {0, 3} if self._plan.rival is not None else {0}
        return [
            f"exit code {driver.returncode} of driver {number}"
            for number, driver in enumerate(self.drivers)
            if driver.returncode not in (allowed | ({-9} if driver.pid in self._killed else set()))
        ]

    def _start(self, name: str) -> None:
        self.drivers.append(start_run(self._config, self._folder, self._arena.environment, name))

    def _is_over(self) -> bool:
        return all(driver.poll() is not None for driver in self.drivers)

    def _strike(self, strike: Strike) -> bool:
        while not self._has_come(strike):
            if self._is_over():
                return False
            time.sleep(POLL_S)
        time.sleep(strike.delay_s)
        victims = [] if self._is_over() else self._victims(strike.victim)
        if not victims:
            return False
        victim = victims[round(strike.choice * (len(victims) - 1))]
        with suppress(psutil.NoSuchProcess):
            self._do(strike, victim)
            return True
        return False

    def _has_come(self, strike: Strike) -> bool:
        if strike.event == "seen":
            return bool(self._victims(strike.victim))
        folder = {"part": "data", "mark": "_ledger"}[strike.event]
        return len(self._place.versions(folder)) >= strike.count

    def _victims(self, victim: str) -> list[psutil.Process]:
        if victim == "driver":
            return [psutil.Process(driver.pid) for driver in self.drivers if driver.poll() is None]
        if victim == "node":
            return [process for node in self._arena.nodes.workers for process in node.find(PROCESS[victim])]
        return self._arena.nodes.find(PROCESS[victim])

    def _do(self, strike: Strike, victim: psutil.Process) -> None:
        nodes = self._arena.nodes
        if strike.victim == "driver" and strike.deed == "kill":
            self._killed.add(victim.pid)
        if strike.deed == "suspend":
            suspend(victim, strike.seconds)
        elif strike.victim == "node":
            for node in nodes.workers:
                if victim in node.tree():
                    node.kill()
        else:
            victim.kill()
        if strike.victim == "node":
            nodes.restore()


def wait_for_parts(driver: subprocess.Popen[bytes], output: Path, parts: int) -> bool:
    """True once so many parts stand and the run still goes on."""
    deadline = time.monotonic() + TIMEOUT_S
    while driver.poll() is None:
        if len(list(output.glob("data/*.parquet"))) >= parts:
            return True
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(POLL_S)
    return False


def wait_or_kill(driver: subprocess.Popen[bytes], seconds: float) -> None:
    """A driver that does not end is killed; its exit code tells."""
    try:
        driver.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()


def play(plan: Round, arena: Arena, folder: Path) -> Outcome:
    """One round: what was hit, how the drivers ended, and everything that is wrong after at most one more run."""
    outcome = Outcome()
    expected = arena.expected(plan.store)
    place = arena.place(folder, plan.store)
    config = arena.config(folder, plan.store, plan.actors)
    began = time.monotonic()
    with Reader(place, expected) as reader:
        struck = Struck(plan, arena, folder)
        with arena.faults(plan.store, plan.seed) as faults:
            outcome.hits = struck.run()
        outcome.faults = len(faults)
        outcome.seconds["struck"] = time.monotonic() - began
        last = start_run(config, folder, arena.environment, "last")
        wait_or_kill(last, TIMEOUT_S)
        outcome.seconds["last"] = time.monotonic() - began - outcome.seconds["struck"]
    outcome.codes = [driver.returncode for driver in [*struck.drivers, last]]
    outcome.looks = reader.looks
    outcome.problems = [*struck.unexpected(), *sorted(reader.problems)]
    if last.returncode != 0:
        outcome.problems.append(f"exit code {last.returncode} of the last run")
    outcome.problems += violations(config, place, expected)
    outcome.seconds["all"] = time.monotonic() - began
    outcome.seconds = {name: round(seconds, 1) for name, seconds in outcome.seconds.items()}
    return outcome


def command_of(seed: int) -> str:
    return f"python -m tests.support.chaos --rounds 1 --first-seed {seed} --record chaos.jsonl"


if __name__ == "__main__":
    from tests.support.chaos_recorder import main

    main()
