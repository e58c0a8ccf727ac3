"""A real S3 server on loopback for tests: SeaweedFS, with an owner and a job that may do little.

with s3_server() as server:
    server.become(monkeypatch, server.owner)
    server.client(server.owner).put_object(Bucket="raw", Key="a.tar", Body=b"…")
    Store(Storage(endpoint_url=server.endpoint_url)).read("s3://raw/a.tar")
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage

BUCKETS = ("raw", "labels")
READY_WITHIN_S = 30.0
GRPC_SERVERS = ("master", "volume", "filer", "s3", "admin")


@dataclass(frozen=True)
class Identity:
    """Who asks: a pair of keys."""

    access_key: str
    secret_key: str


OWNER = Identity("owner-key", "owner-secret")
JOB = Identity("job-key", "job-secret")  # reads `raw`, reads and writes `labels`, and nothing else
ACTIONS = {
    OWNER: ["Admin", "Read", "List", "Tagging", "Write"],
    JOB: ["Read:raw", "List:raw", "Read:labels", "List:labels", "Write:labels"],
}


@dataclass
class S3Server:
    """A server and its data. It can be killed and started again on the same data and the same port."""

    directory: Path
    ports: list[int]
    owner: Identity = OWNER
    job: Identity = JOB
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _present: list[Identity | None] = field(default_factory=list, repr=False)  # whom `become` made, the last one last

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def environment(self, identity: Identity | None) -> dict[str, str]:
        """The AWS_ variables of a process that is this identity, or nobody. See `without_aws` for the others.

        Nothing on the machine adds to them: no profile, no instance's metadata.
        """
        keys = (
            {"AWS_ACCESS_KEY_ID": identity.access_key, "AWS_SECRET_ACCESS_KEY": identity.secret_key} if identity else {}
        )
        return keys | {
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def become(self, monkeypatch: pytest.MonkeyPatch, identity: Identity | None) -> None:
        """Make this process, and what it starts from now on, this identity, or nobody."""
        for name in os.environ.keys() - without_aws(os.environ).keys():
            monkeypatch.delenv(name)
        for name, value in self.environment(identity).items():
            monkeypatch.setenv(name, value)
        if self._present[-1:] != [identity]:
            storage._remote.cache_clear()  # connections keep the credentials that they were made with
            self._present.append(identity)

    def client(self, identity: Identity) -> Any:
        """A botocore client of S3, independent of the environment."""
        from botocore.config import Config
        from botocore.session import Session

        return Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=identity.access_key,
            aws_secret_access_key=identity.secret_key,
            config=Config(retries={"total_max_attempts": 3, "mode": "standard"}, s3={"addressing_style": "path"}),
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        log = self.directory / "weed.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                env={**without_aws(os.environ), "GOMEMLIMIT": "200MiB", "GOMAXPROCS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )
        deadline = time.monotonic() + READY_WITHIN_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"weed does not answer at {self.endpoint_url}:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Take it away without notice. What was answered stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        for name, port in zip(GRPC_SERVERS, self.ports[5:], strict=True):
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    def restart(self) -> None:
        self.kill()
        self.start()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _command(self) -> list[str]:
        s3, master, volume, filer, admin = self.ports[:5]
        grpc = dict(zip(GRPC_SERVERS, self.ports[5:], strict=True))
        return [
            str(Path(sys.executable).with_name("weed")),
            *("mini", f"-dir={self.directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}"),
            *(f"-filer.port={filer}", f"-admin.port={admin}"),
            *(f"-{name}.port.grpc={port}" for name, port in grpc.items()),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            *("-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *(f"-s3.localSocket={self.directory}/s3.sock", f"-filer.localSocket={self.directory}/filer.sock"),
            f"-s3.config={self.directory}/s3.json",
        ]


@contextmanager
def s3_server(job: Identity = JOB, for_all: bool = False) -> Iterator[S3Server]:
    """A running server with the empty buckets `raw` and `labels`; another `job` than JOB may do the same.

    With `for_all` so may whoever shows no keys: for workers whose environment a test does not make.
    """
    directory = Path(tempfile.mkdtemp(prefix="s3-"))  # short: the path of a Unix socket has at most 107 bytes
    server = S3Server(directory, free_ports(5 + len(GRPC_SERVERS)), job=job)
    identities = [_entry(OWNER, ACTIONS[OWNER]), _entry(job, ACTIONS[JOB])]
    identities += [{"name": "anonymous", "actions": ACTIONS[JOB]}] if for_all else []
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    try:
        server.start()
        client = server.client(server.owner)
        for bucket in BUCKETS:
            client.create_bucket(Bucket=bucket)
        yield server
    finally:
        server.kill()  # it takes two seconds to end by itself, and leaves nothing that anybody reads
        shutil.rmtree(directory, ignore_errors=True)


def _entry(identity: Identity, actions: list[str]) -> dict[str, Any]:
    keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
    return {"name": identity.access_key, "credentials": [keys], "actions": actions}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def without_aws(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("AWS_")}
