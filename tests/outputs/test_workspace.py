"""Temporary folders of commits: those of killed processes are removed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.outputs.workspace import PREFIX, sweep_workspaces, workspace

HOLD = """
import sys
from pipeline.outputs.workspace import workspace
with workspace() as folder:
    (folder / "part").write_bytes(b"half a part")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold() -> tuple[subprocess.Popen[str], Path]:
    """Another process in the middle of a commit, some time ago."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    age(folder)
    return process, folder


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600, time.time() - 3600))


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_stays(temporary: Path) -> None:
    killed, left = hold()
    alive, held = hold()
    killed.kill()
    killed.communicate()
    sweep_workspaces()
    assert not left.exists()
    assert (held / "part").read_bytes() == b"half a part"
    alive.communicate()
    assert not held.exists()
    assert list(temporary.iterdir()) == []


def test_what_is_new_may_not_be_locked_yet(temporary: Path) -> None:
    fresh = temporary / f"{PREFIX}fresh"
    fresh.mkdir()
    sweep_workspaces()
    assert fresh.exists()
    age(fresh)
    sweep_workspaces()
    assert not fresh.exists()


def test_our_own_is_not_swept() -> None:
    with workspace() as folder:
        age(folder)
        sweep_workspaces()
        assert folder.exists()
    assert not folder.exists()
