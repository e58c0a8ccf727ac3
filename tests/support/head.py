"""A real Ray head on loopback, as `ray start --head` makes it, with logical GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.support.s3 import free_ports

START_S = 60.0


@dataclass(frozen=True)
class Head:
    dashboard: str  # what `ray job submit --address` takes
    gcs: str  # what `ray.init` takes
    log: Path


@contextmanager
def ray_head(folder: Path, environment: Mapping[str, str], num_gpus: int) -> Iterator[Head]:
    """Two CPUs and some GPUs that are only numbers; jobs inherit the environment. Ends with its own processes."""
    gcs, dashboard, agent, client = free_ports(4)
    log = folder / "head.log"
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--num-cpus=2", f"--num-gpus={num_gpus}"),
        *(f"--temp-dir={folder / 'ray'}", "--object-store-memory=300000000"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(environment))
    try:
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", log)
        _wait_until_ready(head, process)
        yield head
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(f"{head.dashboard}/api/version", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the head does not start:\n{head.log.read_text()}")


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead to another Ray; `python` is this one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    # A head that is told to stop would wait 30 s for its drained self.
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
