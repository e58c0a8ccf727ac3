"""Planted secrets, and everything that runs write: none of them is anywhere in it. A local run serves loopback only."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import JobConfig, make_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.storage import Store
from tests.support.head import clean_environment, ray_head
from tests.support.jobs import digits_config, digits_tars
from tests.support.s3 import Identity, S3Server, s3_server
from tests.support.web import serving

ROOT = Path(__file__).parents[2]
WORD = b"PLANTED"  # in every secret
JOB = Identity("the-job", "PLANTED/secret+key/0123456789abcdef01234")
TOKEN = "PLANTED//session//token=="
PASSWORD = "PLANTED-password"
PROXY = f"http://me:{PASSWORD}@127.0.0.1:9"
SIGNED = "X-Amz-Credential=PLANTED-credential&X-Amz-Signature=PLANTED-signature"
SHARDS, PER_SHARD = 2, 12


# --- Where to look -------------------------------------------------------------------------------------------------


def needles(word: bytes) -> list[bytes]:
    """The word as it is, in hex, and in base64 wherever it stands in what was encoded."""
    encoded = [base64.b64encode(bytes(offset) + word)[-(-offset * 8 // 6) : -4] for offset in range(3)]
    return [word, word.hex().encode(), *encoded]


def holds_secret(data: bytes) -> bool:
    return any(needle in data for needle in needles(WORD))


def unfolded(data: bytes) -> bytes:
    """What a file says, with all that is compressed in a Parquet file: its rows and its schema's metadata."""
    if not data.startswith(b"PAR1"):
        return data
    table = pq.read_table(pa.BufferReader(data))
    return data + repr((table.schema.metadata, table.to_pylist())).encode()


def guilty_files(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files, f"{folder} is empty"
    return [str(path) for path in files if holds_secret(unfolded(path.read_bytes()))]


def test_the_search_finds_what_is_hidden(tmp_path: Path):
    table = pa.table({"shard": ["http://host/a.tar?sig=PLANTED"] * 100})
    for place in ("rows", "footer"):
        shown = table if place == "rows" else pa.table({"a": [1]}).replace_schema_metadata({"shard": "PLANTED"})
        pq.write_table(shown, tmp_path / place, compression="zstd")
    (tmp_path / "plain").write_bytes(b"x=PLANTED-password\n")
    for offset in range(3):
        (tmp_path / f"basic{offset}").write_bytes(base64.b64encode(b"u:"[:offset] + PASSWORD.encode()))
    (tmp_path / "innocent").write_bytes(b"planted")
    assert {Path(name).name for name in guilty_files(tmp_path)} == {
        "rows",
        "footer",
        "plain",
        *map("basic{}".format, range(3)),
    }


# --- What runs write -----------------------------------------------------------------------------------------------


class Web(ThreadingHTTPServer):
    """Shards that fail when they are read: one vanishes, one is sent on to a signed address that denies it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(200)

    def do_GET(self) -> None:
        self._answer(404 if "gone" in self.path else 403)

    def _answer(self, status: int) -> None:
        is_moved = self.path == "/moved.tar"
        self.send_response(302 if is_moved else status)
        if is_moved:
            self.send_header("Location", f"/elsewhere.tar?{SIGNED}")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "10240" if self.command == "HEAD" and not is_moved else "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass
class Written:
    """What there is to search: folders, the store, what was printed, and the answers of the Jobs API."""

    server: S3Server
    config: dict[str, Any]
    folders: list[Path] = field(default_factory=list)
    printed: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # by run: exit code, stdout and stderr
    jobs: bytes = b""
    listening: set[str] = field(default_factory=set)  # addresses of the local run's servers

    def run(self, name: str, verb: str, *arguments: str, watch: bool = False, **environment: str) -> None:
        command = [sys.executable, "-m", "pipeline", verb, *arguments, "--debug"]
        own = clean_environment() | self.server.environment(JOB) | environment
        with subprocess.Popen(command, env=own, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            if watch:
                threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            output = process.communicate(timeout=240)[0]
        self.printed[name] = process.returncode, output

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Note where the process and its children listen, several times a second."""
        while process.poll() is None:
            with suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                for one in (parent, *parent.children(recursive=True)):
                    with suppress(psutil.Error):
                        found = one.net_connections("inet")
                        self.listening |= {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
            time.sleep(0.3)


@contextmanager
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie below it, and the path of a socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="s-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving(Web()) as server:
        yield server


@pytest.fixture(scope="module")
def written(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """After a local run, a submitted one, and runs that fail at the store in ways that make it talk."""
    with s3_server(JOB) as server, short_folder() as local, short_folder() as cluster:
        client = server.client(server.owner)
        client.create_bucket(Bucket="denied")
        for path in digits_tars(tmp_path_factory.mktemp("shards"), SHARDS, PER_SHARD, broken=[1]):
            client.put_object(Bucket="raw", Key=path.name, Body=path.read_bytes())
        urls = ["s3://raw/*.tar", f"{web.url}/gone.tar", f"{web.url}/moved.tar"]
        storage = {"endpoint_url": server.endpoint_url}
        found = Written(
            server,
            digits_config("x", "s3://labels/local", input={"url": urls}, storage=storage, runtime={"engine": "noop"}),
        )
        job = tmp_path_factory.mktemp("job") / "job.yaml"
        job.write_text(yaml.safe_dump(found.config))
        found.folders = [local, cluster]

        nowhere = ["storage.endpoint_url=http://s3.invalid", "storage.deadline_s=1"]
        environment = clean_environment() | server.environment(JOB)
        with ThreadPoolExecutor(1) as pool:  # beside the head
            others = [
                pool.submit(found.run, "local", "run", str(job), watch=True, RAY_TMPDIR=str(local)),
                pool.submit(found.run, "denied", "run", str(job), "input.url=s3://denied/*.tar"),
                pool.submit(found.run, "wrong key", "run", str(job), AWS_SECRET_ACCESS_KEY="PLANTED-wrong"),
                pool.submit(found.run, "token", "run", str(job), AWS_SESSION_TOKEN=TOKEN),
                pool.submit(found.run, "proxy", "run", str(job), *nowhere, HTTP_PROXY=PROXY, NO_PROXY="", no_proxy=""),
            ]
            with ray_head(cluster, environment, num_gpus=0) as head:
                there = ("output.url=s3://labels/submitted", "--address", head.dashboard)
                found.run("submitted", "submit", str(job), *there)
                with urllib.request.urlopen(f"{head.dashboard}/api/jobs/") as answer:
                    found.jobs = answer.read()
            for other in others:
                other.result()
        yield found


def test_the_runs_did_what_could_betray_something(written: Written):
    codes = {name: code for name, (code, _) in written.printed.items()}
    said = {name: output.decode() for name, (_, output) in written.printed.items()}
    assert codes == {"local": 3, "denied": 1, "wrong key": 1, "token": 1, "proxy": 3, "submitted": 3}, said
    for name in ("local", "submitted"):
        assert "2 committed" in said[name]
        assert "gone.tar stays open" in said[name]
        assert "moved.tar stays open" in said[name]
    assert "Traceback" in said["denied"]
    assert "AWS_ACCESS_KEY_ID" in said["token"]
    assert "127.0.0.1:9" in said["proxy"]
    assert len(json.loads(written.jobs)) == 1


@pytest.mark.parametrize("name", ["local", "denied", "wrong key", "token", "proxy", "submitted"])
def test_no_secret_is_printed(written: Written, name: str):
    output = written.printed[name][1]
    assert [line for line in output.splitlines() if holds_secret(line)] == []


def test_no_secret_is_in_the_datasets_and_reports(written: Written):
    client = written.server.client(written.server.owner)
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="labels")["Contents"]]
    for folder in ("local", "submitted"):
        names = {key.split("/")[1] for key in keys if key.startswith(f"{folder}/")}
        assert names == {"README.md", "_dataset.json", "_ledger", "_runs", "data", "errors"}
    contents = {key: client.get_object(Bucket="labels", Key=key)["Body"].read() for key in keys}
    assert [key for key, data in contents.items() if holds_secret(unfolded(data))] == []


def test_no_secret_is_in_rays_files_and_job_records(written: Written):
    local, cluster = written.folders
    assert list(local.rglob("worker-*.out"))
    assert list(cluster.rglob("runtime_env_agent.log"))
    assert list(cluster.rglob("config.yaml")), "what was submitted was unpacked here"
    assert [guilty_files(folder) for folder in written.folders] == [[], []]
    assert not holds_secret(written.jobs)


def test_a_local_run_can_be_reached_from_this_machine_only(written: Written):
    assert written.listening
    assert {ip.removeprefix("::ffff:") for ip in written.listening} == {"127.0.0.1"}


# --- What travels to workers ---------------------------------------------------------------------------------------


def test_no_secret_is_pickled(written: Written, monkeypatch: pytest.MonkeyPatch):
    from ray import cloudpickle

    from pipeline.model.predictor import PredictorSettings
    from pipeline.model.spec import ModelInfo, make_spec
    from pipeline.planning import make_plan
    from pipeline.preparation import Job
    from pipeline.rows import Columns

    written.server.become(monkeypatch, JOB)
    config = make_config(written.config | {"input": {"url": "s3://raw/*.tar"}})
    store = Store(config.input_storage)
    plan = make_plan(config.model_copy(update={"output": config.output.model_copy(update={"url": "s3://labels/new"})}))
    assert len(plan.tasks) == SHARDS
    assert store.find("s3://raw"), "a store with a connection"
    spec = make_spec(config)
    settings = PredictorSettings("eager", "cpu", 1, Columns(5, "float16", 64))
    job = Job(config, spec, ModelInfo(10, None, 64), settings, 1, 0)
    pickled = cloudpickle.dumps([store, config, spec, job, plan])
    assert b"s3://raw/digits-000.tar" in pickled
    assert not holds_secret(pickled)


def test_no_secret_is_in_an_error(written: Written, web: Web, monkeypatch: pytest.MonkeyPatch):
    written.server.become(monkeypatch, JOB)
    store = Store(make_config(written.config).input_storage)
    for url in ("s3://denied/a.tar", f"{web.url}/moved.tar", f"{web.url}/gone.tar?{SIGNED}", "s3://raw/none"):
        with pytest.raises(PipelineError) as caught:
            store.read(url)
        assert not holds_secret(str(caught.value).encode())


# --- What a config may not hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"https://bucket.s3.amazonaws.com/a.tar?{SIGNED}",
        "https://account.blob.core.windows.net/c/a.tar?sv=2026-01-01&sig=PLANTED",
        "https://storage.googleapis.com/b/a.tar?GoogleAccessId=x&Signature=PLANTED",
        "https://host/a.tar?access_token=PLANTED",
        "https://host/a.tar?id=3&api-key=PLANTED",
        f"https://me:{PASSWORD}@host/a.tar",
    ],
)
def test_no_url_with_a_secret_gets_as_far_as_a_shard(url: str, tmp_path: Path):
    from pipeline.inputs.shards import discover

    (tmp_path / "list.txt").write_text(f"{url}\n")
    base = {"input": {"url": "in"}, "output": {"url": "out"}}
    for section, key in (("input", "url"), ("output", "url"), ("storage", "endpoint_url"), ("runtime", "address")):
        with pytest.raises(ConfigError) as caught:
            make_config(base | {section: {key: url}})
        assert f"{section}.{key}" in str(caught.value)
        assert not holds_secret(str(caught.value).encode())
    with pytest.raises(ConfigError) as caught:
        discover(make_config(base | {"input": {"url": str(tmp_path / "list.txt")}}).input, Store())
    assert "a password or a signature" in str(caught.value)
    assert not holds_secret(str(caught.value).encode())


def test_other_queries_are_part_of_a_name():
    url = "https://host/get.tar?download=true&id=3&versionId=x"
    assert JobConfig(input={"url": url}, output={"url": "o"}).input.urls == [url]  # type: ignore[arg-type]
