"""Asks the OSV database whether a locked package has a known vulnerability: `make audit`.

    python scripts/audit.py [--osv-url URL]

Exits 1 where one has, or where the answer is incomplete. Where the database can't be reached it says SKIPPED and exits
0, so that a machine without a network can run everything else; pip-audit alone would say that it found nothing.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("torch", "base", "dev")
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|ServiceError|NewConnectionError|NameResolutionError"
)


def ask(*options: str) -> subprocess.CompletedProcess[str]:
    """pip-audit's answer on all lock files; nothing is installed or resolved."""
    files = [part for lock in LOCKS for part in ("-r", f"requirements/{lock}.lock")]
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        *files,
        "--require-hashes",
        "--disable-pip",
        "--vulnerability-service",
    ]
    command += ["osv", "--format", "json", "--progress-spinner", "off", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def judge(answer: str, errors: str) -> tuple[int, str]:
    """The exit code, and what to say."""
    try:
        packages: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError):
        if UNREACHABLE.search(errors):
            return 0, "SKIPPED: the vulnerability database can't be reached from here. NOTHING WAS CHECKED."
        return 1, f"pip-audit failed:\n{errors}"
    unknown = [
        f"{package['name']}: not checked, {package['skip_reason']}" for package in packages if "vulns" not in package
    ]
    found = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in {known['fix_versions'] or 'no version'}"
        for package in packages
        for known in package.get("vulns", ())
    ]
    summary = f"{len(packages)} locked packages: {len(found)} known vulnerabilities, {len(unknown)} not checked"
    return int(bool(found or unknown or not packages)), "\n".join([*found, *unknown, summary])


def main() -> None:
    if importlib.util.find_spec("pip_audit") is None:
        sys.exit("pip-audit is not installed here: pip install pip-audit")
    done = ask(*sys.argv[1:])
    code, text = judge(done.stdout, done.stderr)
    print(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
