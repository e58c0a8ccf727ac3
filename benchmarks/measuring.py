"""Runs a command and watches it: the time from start to exit, and the memory of all its processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_S = 0.25
GRACE_S = 20.0


@dataclass(frozen=True)
class Watched:
    started: float  # seconds since the epoch
    seconds: float
    peak_mb: float | None  # PSS of the process tree


def watch(command: list[str], env: dict[str, str], log: Path, memory: bool) -> Watched:
    """Run the command to its end, and wait until all that it started has ended as well.

    Taking the `memory` costs some percent of a core, so that such a run's times don't count. PSS shares out pages
    among the processes that have them, so the sum over processes counts each page once, those of Ray's object store
    included. Raises SystemExit with the end of the log where the command fails.
    """
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(command, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT)
        tree = _Tree(process.pid, memory)
        code = process.wait()
        seconds = time.time() - started
    tree.join()
    tree.end()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}")
    return Watched(started, seconds, tree.peak_mb)


class _Tree(threading.Thread):
    """Looks at a process and its descendants until they all have ended."""

    def __init__(self, pid: int, memory: bool) -> None:
        super().__init__(daemon=True)
        self._seen: dict[int, psutil.Process] = {}
        self._root, self._memory = psutil.Process(pid), memory
        self.peak_mb: float | None = 0.0 if memory else None
        self.start()

    def run(self) -> None:
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                for process in [self._root, *self._root.children(recursive=True)]:
                    self._seen.setdefault(process.pid, process)
            alive = [process for process in self._seen.values() if _is_alive(process)]
            if self._memory:
                self.peak_mb = max(self.peak_mb or 0, sum(pss_mb(process.pid) for process in alive))
            if not _is_alive(self._root):
                deadline = deadline or time.monotonic() + GRACE_S
                if not alive:
                    return
            time.sleep(EVERY_S if self._memory or deadline else 1.0)

    def end(self) -> None:
        """Kill what outlived its grace, so that it takes no time from whoever is next."""
        for process in filter(_is_alive, self._seen.values()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def pss_mb(pid: int, with_shared: bool = True) -> float:
    """The memory of a process, shared pages divided among their holders; without shared memory, which is that of
    Ray's object store, if asked for. 0 where it has just ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    kb = {row[0]: int(row[1]) for row in map(str.split, rollup.splitlines()) if row[0].startswith("Pss")}
    return (kb.get("Pss:", 0) - (0 if with_shared else kb.get("Pss_Shmem:", 0))) / 1024
