"""The set-up is reproducible and tells the truth: lock files, changelog and Makefile against pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("torch", "base", "dev")
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")
PLATFORM = {"python_version": "3.11", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
TARGETS = {"help", "demo", "test", "check", "audit", "lock", "clean"}
HOLDS_HERE = subprocess.run([sys.executable, ROOT / "scripts" / "lock.py", "--holds-here"], check=False).returncode == 0


def lines(lock: str) -> list[str]:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def pins(*locks: str) -> dict[str, Version]:
    """Package to the version that these lock files pin it to."""
    found = [LINE.fullmatch(line) for lock in locks for line in lines(lock)]
    return {match[1]: Version(match[2]) for match in found if match}


def satisfied(requirement: Requirement, pinned: dict[str, Version]) -> bool:
    name = canonicalize_name(requirement.name)
    return name in pinned and pinned[name] in requirement.specifier


def asked(*extras: str) -> Iterator[Requirement]:
    """What pyproject.toml asks for on the locked platform, with these extras and those that they name in turn."""
    texts = list(PROJECT["project"]["dependencies"]) if not extras else []
    for extra in extras:
        texts += PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["project"]["name"]:
            yield from asked(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate(PLATFORM):
            yield requirement


def needed_by(name: str, extra: str) -> Iterator[Requirement]:
    """What the installed package of that name needs here, by its own account."""
    for requirement in map(Requirement, importlib.metadata.requires(name) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def make(*arguments: str) -> str:
    """What `make` prints, without what an outer `make test` puts into the environment."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "TORCH_INDEX", "LOCKED", "CI"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_of_a_lock_is_one_version_with_one_hash(lock):
    assert lines(lock)
    assert [line for line in lines(lock) if not LINE.fullmatch(line)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_no_place_to_download_from(lock):
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    assert not re.search(r"://|index|find-links| @ ", text)


def test_no_package_is_pinned_twice():
    names = [line.split("==")[0] for lock in LOCKS for line in lines(lock)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("extras", "locks"), [((), LOCKS[:2]), (("cpu", "demo"), LOCKS[:2]), (("dev",), LOCKS)], ids=["base", "demo", "dev"]
)
def test_locks_hold_what_pyproject_asks_for(extras, locks):
    for requirement in asked(*extras):
        assert satisfied(requirement, pins(*locks)), requirement


def test_the_build_needs_nothing_beyond_the_base_lock():
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert satisfied(requirement, pins("base")), requirement


def test_only_the_torch_lock_has_gpu_libraries():
    gpu = re.compile(r"torch.*|triton|(nvidia|cuda)-.*")
    assert {"torch", "torchvision"} <= pins("torch").keys()
    assert [name for name in pins("torch") if not gpu.fullmatch(name)] == []
    assert [name for name in pins("base", "dev") if gpu.fullmatch(name)] == []


@pytest.mark.skipif(not HOLDS_HERE, reason="the lock files are for Linux x86-64 with Python 3.11")
@pytest.mark.parametrize("locks", [LOCKS[:2], LOCKS], ids=["demo", "dev"])
def test_locks_lack_nothing_that_a_locked_package_needs(locks):
    """With --no-deps pip would not notice."""
    todo = [*asked(), *asked(*(("dev",) if "dev" in locks else ("cpu", "demo")))]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert satisfied(requirement, pins(*locks)), requirement
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += needed_by(name, extra)


def test_newest_changelog_entry_is_this_version():
    newest = re.search(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == PROJECT["project"]["version"]


def test_make_help_lists_every_target():
    assert set(re.findall(r"^make (\w+) +\S", make("help"), re.M)) == TARGETS
    assert make() == make("help")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_documented_target_can_be_made(target):
    assert make("--dry-run", "--always-make", target)


def test_set_up_takes_the_locks_with_hashes_where_they_hold():
    commands = make("--dry-run", "--always-make", "test", "LOCKED=yes").splitlines()
    locked = [line for line in commands if ".lock" in line]
    assert [re.findall(r"requirements/(\w+)\.lock", line) for line in locked] == [["torch", "base"], ["dev"]]
    assert all("--require-hashes --no-deps" in line for line in locked)
    assert any("--no-deps --no-build-isolation --editable ." in line for line in commands)


def test_set_up_takes_the_bounds_of_pyproject_elsewhere():
    commands = make("--dry-run", "--always-make", "test", "LOCKED=")
    assert ".lock" not in commands
    assert re.findall(r"--editable (\S+)", commands) == ["'.[cpu,demo]'", "'.[dev]'"]


@pytest.mark.parametrize("locked", ["yes", ""])
def test_torch_index_gives_the_locked_versions_without_gpu_libraries(locked):
    commands = make("--dry-run", "--always-make", "demo", f"LOCKED={locked}", "TORCH_INDEX=https://example.org/cpu")
    torch = pins("torch")
    wanted = f"--index-url https://example.org/cpu torch=={torch['torch']} torchvision=={torch['torchvision']}"
    assert wanted in commands
    assert "torch.lock" not in commands
