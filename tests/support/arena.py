"""Where rounds of violence take place: a cluster of several nodes, a job, and a store, on disk or S3 with faults."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline import storage
from tests.support.jobs import digits_config, digits_tars
from tests.support.nodes import ROOT, Nodes, node_environment
from tests.support.relay import Relay, relay
from tests.support.s3 import S3Server, s3_server
from tests.support.soundness import Expected, InBucket, OnDisk, Place

SHARDS, PER_SHARD = 30, 40
SCALE = int(os.environ.get("CHAOS_SCALE", "40"))  # how large the digits are: what makes decoding take its time
BATCH_SIZE = 16
UNDISTURBED_S = 300.0
# Of a hundred requests, ten go wrong.
FAULTS = {
    "500": ".*",
    "slowdown": ".*",
    "503": ".*",
    "reset": ".*",
    "commit_then_reset": "PUT|DELETE",
    "truncate": "GET",
    "midreset": "GET",
    "slow": "GET",
}
RATES = {"500": 0.02, "slowdown": 0.02, "503": 0.01, "reset": 0.02, "slow": 0.01}
PATIENCE = {"connect_timeout_s": 2.0, "read_timeout_s": 5.0}


@dataclass
class Arena:
    """A cluster and a job on it, for many rounds. `folder` has the shards and each round's output."""

    nodes: Nodes
    folder: Path
    environment: Mapping[str, str]
    server: S3Server
    line: Relay
    _expected: dict[str, Expected] = field(default_factory=dict)

    def config(self, folder: Path, store: str = "disk", actors: int = 1) -> dict[str, Any]:
        """The job whose output belongs to this folder; on S3 that is a prefix of its name."""
        if store == "disk":
            return job_config(self.folder / "shards", folder / "labels", self.nodes.address, actors)
        url, storage = f"s3://labels/{folder.name}", {"endpoint_url": self.line.url, **PATIENCE}
        return job_config("s3://raw/digits/*.tar", url, self.nodes.address, actors) | {"storage": storage}

    def place(self, folder: Path, store: str) -> Place:
        if store == "disk":
            return OnDisk(folder / "labels")
        return InBucket(self.server.client(self.server.owner), "labels", folder.name)

    @contextmanager
    def faults(self, store: str, seed: int) -> Iterator[list[str]]:
        """One request to the store in ten goes wrong; they are noted."""
        noted: list[str] = []
        if store == "disk":
            yield noted
            return
        self.line.chance = random.Random(seed)
        self.line.spoiled.clear()
        for kind, methods in FAULTS.items():
            self.line.spoil(methods, kind, times=None, rate=RATES.get(kind, 0.02))
        try:
            yield noted
        finally:
            self.line.heal()
            noted += self.line.spoiled

    def expected(self, store: str) -> Expected:
        """The rows of a run that nobody disturbs, which also fills the node's cache of networks. Made once."""
        if store not in self._expected:
            folder = self.folder / f"undisturbed-{store}"
            folder.mkdir()
            config = self.config(folder, store)
            driver = start_run(config, folder, self.environment)
            assert driver.wait(UNDISTURBED_S) == 0, (folder / "driver.log").read_text()
            self._expected[store] = Expected.of(config)
            assert self._expected[store].listing.total() == SHARDS * PER_SHARD
        return self._expected[store]

    def _make_shards(self) -> None:
        client = self.server.client(self.server.owner)
        for path in make_shards(self.folder / "shards"):
            client.put_object(Bucket="raw", Key=f"digits/{path.name}", Body=path.read_bytes())


def make_shards(folder: Path) -> list[Path]:
    """Thirty tars of forty digits, one of which cannot be read."""
    return digits_tars(folder, SHARDS, PER_SHARD, broken=[3], scale=SCALE)


def job_config(input_url: str | Path, output_url: str | Path, address: str, actors: int = 1) -> dict[str, Any]:
    """A job whose processes need no torch once this node has converted its network."""
    runtime = {"address": address, "engine": "openvino", "batch_size": BATCH_SIZE, "actors": actors}
    return digits_config(input_url, output_url, runtime=runtime, storage={"shared": True})


@contextmanager
def arena(folder: Path, cache: Path) -> Iterator[Arena]:
    """A cluster, a store and shards. `cache` keeps converted networks from one arena to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        server = stack.enter_context(s3_server())
        line = stack.enter_context(relay(server.endpoint_url))
        stack.enter_context(_identity_of(server))  # this process reads the datasets, too
        environment = node_environment(
            {**server.environment(server.owner), "RESNET_BATCH_CACHE": str(cache), "TMPDIR": str(folder)}
        )
        nodes = Nodes(environment)
        stack.callback(nodes.stop)
        nodes.start()
        found = Arena(nodes, folder, environment, server, line)
        found._make_shards()
        yield found


@contextmanager
def _identity_of(server: S3Server) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(server.environment(server.owner))
    storage._remote.cache_clear()  # connections keep the credentials that they were made with
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        storage._remote.cache_clear()


def start_run(
    config: dict[str, Any], folder: Path, environment: Mapping[str, str] | None = None, name: str = "driver"
) -> subprocess.Popen[bytes]:
    """A driver in a process of its own, with its log in `folder`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=dict(environment) if environment is not None else None,
        )
