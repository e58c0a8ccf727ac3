"""Writes requirements/*.lock from pyproject.toml: every package with its version and the sha256 of its wheel.

    torch.lock  torch, torchvision and the GPU libraries that only they need: what TORCH_INDEX replaces
    base.lock   everything else of the base install, its build and the extras in BASE
    dev.lock    what the tests need on top

pip decides: the report of its resolver names the very archives that it would install here. So the locks hold for
the platform that they are made on, and are made on one only; `lock.py --holds-here` exits 0 on it. All packages
are resolved together, then those of the base again within that solution, so that no package has two versions.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ".[cpu,demo]"
ALL = ".[dev]"  # includes BASE
GPU = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
HEADER = "# Linux x86-64 (glibc 2.34 or newer), Python 3.11. Made by `make lock` from pyproject.toml; don't edit."


def holds_here() -> bool:
    """Whether this is the platform of the locks; 2.34 is the newest glibc that one of the pinned wheels asks for."""
    linux = (sys.platform, platform.machine()) == ("linux", "x86_64") and platform.libc_ver() >= ("glibc", "2.34")
    return linux and (platform.python_implementation(), sys.version_info[:2]) == ("CPython", (3, 11))


def resolve(requirements: Iterable[str], within: Iterable[str] = ()) -> dict[str, str]:
    """Normalised name to `name==version` of all packages that `requirements` need, hashes beside.

    `within` are pins that the solution keeps to. Raises CalledProcessError where pip finds no solution; pip has
    then printed why.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pin.split()[0] for pin in within))
        constraints.flush()
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
        options = ["--only-binary", ":all:", "--constraint", constraints.name]
        report = subprocess.check_output([*pip, *options, *requirements], cwd=ROOT, text=True)
    # This project itself is in the report too, as a directory.
    return dict(pin(item) for item in json.loads(report)["install"] if "archive_info" in item["download_info"])


def pin(item: dict[str, Any]) -> tuple[str, str]:
    """One package of pip's report: its normalised name, and its line in a lock file."""
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    archive = item["download_info"]["archive_info"]
    return name, f"{name}=={item['metadata']['version']} --hash={archive['hash'].replace('=', ':', 1)}"


def write(name: str, lines: Iterable[str]) -> None:
    by_name = sorted(lines, key=lambda line: line.split("==")[0])
    (ROOT / "requirements" / f"{name}.lock").write_text("\n".join([HEADER, *by_name, ""]))
    print(f"requirements/{name}.lock: {len(by_name)} packages")


def main() -> None:
    if "--holds-here" in sys.argv:
        sys.exit(not holds_here())
    if not holds_here():
        sys.exit("The lock files are for Linux x86-64 with Python 3.11, and can only be made there.")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    everything = resolve([ALL, *build])
    base = resolve([BASE, *build], within=everything.values())
    gpu = {name for name in base if GPU.fullmatch(name)}
    write("torch", (everything[name] for name in gpu))
    write("base", (everything[name] for name in base.keys() - gpu))
    write("dev", (everything[name] for name in everything.keys() - base.keys()))


if __name__ == "__main__":
    main()
