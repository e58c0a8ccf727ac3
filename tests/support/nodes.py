"""A Ray cluster of several nodes on loopback, each a tree of processes that can be killed or suspended.

The head does no work, so that every node that works may die. A dead node is noticed within seconds.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.head import clean_environment
from tests.support.s3 import free_ports

ROOT = Path(__file__).parents[2]
# Not 127.0.0.1, which Ray replaces by an address that others can reach.
IP = "127.0.0.2"
NODES = 2
START_S = 60.0
OBJECT_STORE_BYTES = 100_000_000
IMPATIENT = {
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
}


@dataclass
class Node:
    """What `ray start --block` has started, and all that these have."""

    process: subprocess.Popen[bytes]
    log: Path

    def tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def find(self, name: str) -> list[psutil.Process]:
        """Its processes whose command line begins with `name`, or whose program is called so."""
        return [process for process in self.tree() if _is_called(process, name)]

    def is_whole(self) -> bool:
        """Its raylet is there and not suspended."""
        with suppress(psutil.NoSuchProcess):
            status = [process.status() for process in self.find("raylet")]
            return any(found not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) for found in status)
        return False

    def kill(self) -> None:
        """All of it at once, as when the power goes."""
        doomed = self.tree()
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(20)
        psutil.wait_procs(doomed, timeout=20)


def _is_called(process: psutil.Process, name: str) -> bool:
    with suppress(psutil.Error):
        command = process.cmdline()
        return bool(command) and (command[0].startswith(name) or Path(command[0]).name == name)
    return False


@dataclass
class Nodes:
    """The cluster. Its folder lies in /tmp, since the path of a Unix socket has at most 107 bytes."""

    environment: Mapping[str, str]
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rb-", dir="/tmp")))
    workers: list[Node] = field(default_factory=list)
    head: Node | None = None
    address: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        gcs, dashboard, agent, client = free_ports(4)
        self.address = f"{IP}:{gcs}"
        self.head = self._node(
            *("--head", f"--port={gcs}", "--num-cpus=0", f"--temp-dir={self.folder}", "--include-dashboard=false"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            f"--ray-client-server-port={client}",
        )
        self._wait_for(1)
        self.restore()

    def restore(self) -> None:
        """Replace the nodes that are no longer whole."""
        with self._lock:
            self._restore()

    def _restore(self) -> None:
        for node in [node for node in self.workers if not node.is_whole()]:
            node.kill()
            self.workers.remove(node)
        while len(self.workers) < NODES:  # one after the other, since two at once take the same sockets
            agent = free_ports(1)[0]
            self.workers.append(
                self._node(f"--address={self.address}", "--num-cpus=1", f"--dashboard-agent-listen-port={agent}")
            )
            self._wait_for(1 + len(self.workers))

    @property
    def all(self) -> list[Node]:
        return [*([self.head] if self.head else []), *self.workers]

    def find(self, name: str) -> list[psutil.Process]:
        """The processes of this name, on all nodes."""
        return [process for node in self.all for process in node.find(name)]

    def stop(self) -> None:
        for node in self.all:
            node.kill()

    def _node(self, *options: str) -> Node:
        log = self.folder / f"node-{time.monotonic_ns()}.log"
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={IP}", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false", *options),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=dict(self.environment)
            )
        return Node(process, log)

    def _wait_for(self, count: int) -> None:
        """Until the cluster itself says that so many nodes are alive."""
        deadline = time.monotonic() + START_S
        while _alive(self.address) != count:
            failed = [node.log.read_text() for node in self.all if node.process.poll() is not None]
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster at {self.address} does not have {count} nodes:\n{''.join(failed)}")
            time.sleep(0.1)


def _alive(address: str) -> int:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    with suppress(Exception):  # it is not up yet
        nodes = GcsClient(address=address).get_all_node_info(timeout=2)
        return sum(node.state == 0 for node in nodes.values())
    return 0


def node_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """What nodes and drivers inherit: this tree's code, and a cluster that is quick to call a node dead."""
    return clean_environment() | IMPATIENT | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)} | dict(extra)


def suspend(process: psutil.Process, seconds: float) -> None:
    """SIGSTOP, and SIGCONT after a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
