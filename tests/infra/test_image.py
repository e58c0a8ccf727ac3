"""The container file lints, installs what is locked and nothing else; the README names every placeholder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

INFRA = Path(__file__).parents[2] / "infra"
PLACEHOLDER = r"[\w./-]*\bexample\b[\w./-]*|\b123456789012\b|\b\w+-0123456789abcdef0\b|us-west-\w+"
HADOLINT = Path(sys.executable).parent / "hadolint"


def lint(text: str) -> list[str]:
    command = [str(HADOLINT), "--no-color", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.splitlines()


@pytest.fixture
def containerfile() -> str:
    return (INFRA / "Containerfile").read_text()


def test_the_container_file_lints(containerfile: str) -> None:
    assert lint(containerfile) == []


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [("RUN pip", "RUM pip", "unexpected 'R'"), (":2.60.0-py311-cpu", "", "DL3006"), ("--no-cache-dir ", "", "DL3042")],
)
def test_a_mistake_in_the_container_file_is_found(containerfile: str, right: str, wrong: str, rule: str) -> None:
    assert any(rule in line for line in lint(containerfile.replace(right, wrong)))


def test_it_installs_only_what_is_locked_and_our_wheel(containerfile: str) -> None:
    installs = re.findall(r"pip install (.*?)(?: \\)?$", containerfile, re.MULTILINE)
    assert len(installs) == 3
    for command in installs:
        assert "--no-deps" in command
        assert ("--require-hashes" in command) != ("--no-index /tmp/install/resnet_batch-*.whl" in command)


def test_it_runs_on_our_ray_as_a_numbered_user(containerfile: str) -> None:
    import ray

    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    assert f"FROM docker.io/rayproject/ray:{ray.__version__}-{python}-cpu\n" in containerfile
    users = re.findall(r"^USER (.*)$", containerfile, re.MULTILINE)
    assert users == ["1000:100"]


def test_the_build_sees_what_it_copies_and_no_more(containerfile: str) -> None:
    copied = re.findall(r"^COPY (\S+) ", containerfile, re.MULTILINE)
    rules = (INFRA / "Containerfile.dockerignore").read_text().splitlines()
    assert [rule for rule in rules if not rule.startswith("#")] == ["**", *(f"!{path}" for path in copied)]


def placeholders() -> set[str]:
    files = [path for path in INFRA.rglob("*") if path.is_file() and path.suffix in {".json", ".yaml"}]
    text = "\n".join(path.read_text() for path in files)
    return set(re.findall(PLACEHOLDER, text))


def test_the_readme_names_every_placeholder() -> None:
    table = (INFRA / "README.md").read_text().partition("## Replace")[2].partition("\n\nThe tests")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name for name in re.findall(r"`([^`]+)`", "\n".join(cells)) if re.search(PLACEHOLDER, name)}
    for placeholder in placeholders():
        assert any(name in placeholder for name in named), placeholder
