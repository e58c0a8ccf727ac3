"""`make audit`: what it says of a database that knows of a vulnerability, of none, and of one that is not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.web import serving

ROOT = Path(__file__).parents[1]
needs_pip_audit = pytest.mark.skipif(importlib.util.find_spec("pip_audit") is None, reason="pip-audit is not installed")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Database(ThreadingHTTPServer):
    """Speaks as OSV does, and knows one thing about Pillow."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.knows: dict[str, Any] = {}
        self.asked: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Database

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.add(query["package"]["name"])
        body = json.dumps(self.server.knows.get(query["package"]["name"], {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[Database]:
    with serving(Database()) as server:
        yield server


def audit(url: str) -> tuple[int, str]:
    command = [sys.executable, "scripts/audit.py", "--osv-url", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_pip_audit
def test_every_locked_package_is_asked_for(database: Database) -> None:
    code, text = audit(f"http://127.0.0.1:{database.server_port}/v1/query")
    locked = {
        line.split("==")[0]
        for lock in (ROOT / "requirements").glob("*.lock")
        for line in lock.read_text().splitlines()
        if "==" in line
    }
    assert code == 0, text
    assert database.asked == locked
    assert f"{len(locked)} locked packages: 0 known vulnerabilities, 0 not checked" in text


@needs_pip_audit
def test_a_known_vulnerability_fails(database: Database) -> None:
    affected = {"package": {"name": "pillow", "ecosystem": "PyPI"}, "ranges": [], "versions": []}
    known = {"id": "CVE-1", "schema_version": "1.6.0", "summary": "bad", "affected": [affected], "aliases": []}
    database.knows["pillow"] = {
        "vulns": [known | {"modified": "2026-01-01T00:00:00Z", "published": "2026-01-01T00:00:00Z"}]
    }
    code, text = audit(f"http://127.0.0.1:{database.server_port}/v1/query")
    assert code == 1, text
    assert "pillow" in text
    assert "CVE-1" in text


@needs_pip_audit
def test_a_database_that_is_not_there_is_no_all_clear() -> None:
    code, text = audit("http://127.0.0.1:9/v1/query")
    assert (code, text.strip()) == (
        0,
        "SKIPPED: the vulnerability database can't be reached from here. NOTHING WAS CHECKED.",
    )


def test_what_was_not_checked_is_no_all_clear() -> None:
    """As a package index without vulnerabilities makes pip-audit answer, which ends with 0 then."""
    judge = script().judge
    skipped = {"dependencies": [{"name": "pillow", "skip_reason": "not found on PyPI"}]}
    code, text = judge(json.dumps(skipped), "")
    assert code == 1
    assert "pillow: not checked, not found on PyPI" in text
    assert judge('{"dependencies": []}', "")[0] == 1
    code, text = judge("", "Traceback\nKeyError: 'x'")
    assert code == 1
    assert "KeyError" in text
