"""Plays rounds one after the other and writes a line of JSON for each. See `chaos.py`."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.arena import Arena, arena
from tests.support.chaos import Outcome, Round, play
from tests.support.nodes import ROOT

ROUNDS_PER_CLUSTER = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos", description="Rounds of violence")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--store", choices=["disk", "s3", "both"], default="both", help="leave the other rounds out")
    parser.add_argument("--record", type=Path, required=True, help="a line of JSON is appended for each round")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"in {folder}; failed rounds are kept there", flush=True)
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # and the cluster with it
    with Recorder(folder) as recorder:
        for seed in range(options.first_seed, options.first_seed + options.rounds):
            plan = Round.of(seed)
            if options.store not in ("both", plan.store):
                continue
            line = recorder.record(plan)
            failed += line["outcome"] != "right"
            with options.record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    print(f"{options.rounds} rounds, {failed} failed", flush=True)
    raise SystemExit(1 if failed else 0)


class Recorder:
    """An arena that is replaced after many rounds, or after one that failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._arena: Arena | None = None
        self._rounds = 0
        self._code = code_version()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(keep=False)

    def record(self, plan: Round) -> dict[str, Any]:
        folder = self._folder / f"round-{plan.seed}"
        folder.mkdir()
        began = time.monotonic()
        try:
            found = self._open()
            outcome = play(plan, found, folder)
            restoring = time.monotonic()
            found.nodes.restore()
            outcome.seconds["restore"] = round(time.monotonic() - restoring, 1)
        except Exception:  # noqa: BLE001 - the recorder goes on
            outcome = Outcome(problems=[f"harness: {traceback.format_exc()}"])
        self._rounds += 1
        line = self._line(plan, outcome, time.monotonic() - began)
        (folder / "line.json").write_text(json.dumps(line, indent=1))
        if outcome.problems:
            line["kept"] = [str(folder), str(self._arena.nodes.folder) if self._arena else ""]
            self._close(keep=True)
        else:
            shutil.rmtree(folder)
            if self._rounds % ROUNDS_PER_CLUSTER == 0:
                self._close(keep=False)
        return line

    def _line(self, plan: Round, outcome: Outcome, seconds: float) -> dict[str, Any]:
        return {
            "seed": plan.seed,
            "strikes": [str(strike) for strike in plan.strikes],
            "hits": outcome.hits,
            "rival": plan.rival,
            "actors": plan.actors,
            "store": plan.store,
            "faults": outcome.faults,
            "codes": outcome.codes,
            "outcome": "right" if not outcome.problems else outcome.problems,
            "looks": outcome.looks,
            "seconds": outcome.seconds | {"round": round(seconds, 1)},
            "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "code": self._code,
            "plan": [asdict(strike) for strike in plan.strikes],
        }

    def _open(self) -> Arena:
        if self._arena is None:
            folder = Path(tempfile.mkdtemp(prefix="arena-", dir=self._folder))
            self._arena = self._stack.enter_context(arena(folder, self._folder / "cache"))
        return self._arena

    def _close(self, keep: bool) -> None:
        self._stack.close()
        if self._arena is not None and not keep:
            shutil.rmtree(self._arena.nodes.folder, ignore_errors=True)
            shutil.rmtree(self._arena.folder, ignore_errors=True)
        self._arena = None


def code_version() -> str:
    """The commit, and a hash of the package as it lies here, which may be ahead of it."""
    commit = next(_output("git", "rev-parse", "--short", "HEAD"), "?")
    content = hashlib.sha256()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        content.update(path.read_bytes())
    changed = "+" if any(_output("git", "status", "--porcelain", "pipeline")) else ""
    return f"{commit}{changed} {content.hexdigest()[:12]}"


def _output(*command: str) -> Iterator[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield from done.stdout.splitlines()
