"""The script of the nightly pod, against a small server that answers as Kubernetes does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.support.web import serving

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
COMPLETE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
Answer = tuple[int, dict[str, Any]]


class Kubernetes(ThreadingHTTPServer):
    """Gives the answers that it was given, one a request, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, str, str | None, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(
            (self.command, self.path, self.headers["Authorization"], json.loads(body) if body else None)
        )
        code, document = self.server.answers.pop(0)
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def nightly() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nightly", FOLDER / "nightly.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    with serving(Kubernetes()) as server:
        yield server


@pytest.fixture
def api(nightly: ModuleType, kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {"TIME_ZONE": "Pacific/Kiritimati", "JOB_NAME": "nightly-1", "JOB_UID": "u-1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "namespace").write_text("images")
    (tmp_path / "token").write_text("secret\n")
    return nightly.Api(kubernetes.url, tmp_path, pause_s=0.01)


def run(nightly: ModuleType, api: Any, kubernetes: Kubernetes, *answers: Answer) -> int:
    kubernetes.answers = list(answers)
    code: int = nightly.main(FOLDER / "rayjob.yaml", api)
    assert kubernetes.answers == []
    return code


def test_it_starts_the_nights_rayjob_and_waits(nightly: ModuleType, api: Any, kubernetes: Kubernetes) -> None:
    answers = [(201, {}), (200, {}), (200, {"status": {"jobDeploymentStatus": "Running"}}), (200, {"status": COMPLETE})]
    assert run(nightly, api, kubernetes, *answers) == 0

    (method, path, authorization, body), *polls = kubernetes.asked
    date = datetime.now(ZoneInfo("Pacific/Kiritimati")).strftime("%Y%m%d")
    assert (method, path) == ("POST", "/apis/ray.io/v1/namespaces/images/rayjobs")
    assert authorization == "Bearer secret"
    assert body["metadata"] == {
        "name": f"resnet-batch-{date}",
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-1", "uid": "u-1"}],
    }
    assert body["spec"]["entrypoint"].startswith("resnet-batch run")
    assert {poll[:2] for poll in polls} == {("GET", f"{path}/resnet-batch-{date}")}


def test_a_rayjob_that_exists_is_waited_for(nightly: ModuleType, api: Any, kubernetes: Kubernetes) -> None:
    assert run(nightly, api, kubernetes, (409, {"reason": "AlreadyExists"}), (200, {"status": COMPLETE})) == 0


def test_a_server_that_is_down_is_asked_again(
    nightly: ModuleType, api: Any, kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [(503, {}), (409, {}), (429, {}), (500, {}), (200, {"status": COMPLETE})]
    assert run(nightly, api, kubernetes, *answers) == 0
    assert capsys.readouterr().out.count("asking again") == 3


def test_a_refusal_says_what_was_refused(
    nightly: ModuleType, api: Any, kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(nightly, api, kubernetes, (403, {"message": "rayjobs is forbidden"})) == 1
    assert "refuses with 403" in (said := capsys.readouterr().out)
    assert "rayjobs is forbidden" in said


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({}, None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, None),  # a retry may follow
        ({"jobDeploymentStatus": "Retrying"}, None),
        (COMPLETE, 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 3),
        ({"jobDeploymentStatus": "ValidationFailed"}, 2),
        (FAILED, 1),
        (FAILED | {"message": "Job entrypoint command failed with exit code 3, last available logs"}, 3),
        (FAILED | {"message": "Job entrypoint command failed with exit code 2. No logs available."}, 2),
        (FAILED | {"message": "Job entrypoint command failed with exit code 137, last available logs"}, 1),
        (FAILED | {"message": "its log: Job entrypoint command failed with exit code 3"}, 1),
        (FAILED | {"reason": "DeadlineExceeded"}, 3),
    ],
)
def test_the_exit_code_is_the_runs_own(nightly: ModuleType, status: dict[str, Any], code: int | None) -> None:
    assert nightly.exit_code(status) == code


def test_ray_still_words_the_exit_code_as_we_read_it() -> None:
    import ray

    supervisor = Path(ray.__file__).parent / "dashboard" / "modules" / "job" / "job_supervisor.py"
    assert '"Job entrypoint command "\n                            f"failed with exit code {return_code}' in (
        supervisor.read_text()
    )
