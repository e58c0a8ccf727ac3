"""Tars with members of every kind, made in memory, and readers that are run in processes of their own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname, info.pax_headers = size, kind, link, pax
    return info


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A whole tar. A bare TarInfo stands for a member without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as archive:
        for entry in members:
            name, data = (entry, b"") if isinstance(entry, tarfile.TarInfo) else entry
            info = name if isinstance(name, tarfile.TarInfo) else member(name, len(data))
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One header block as it stands in a tar, so that it can lie."""
    return member(name, size, kind).tobuf(tarfile.USTAR_FORMAT)


def measure(code: str, *arguments: object) -> dict[str, Any]:
    """Run code in a new process; it fills `result`, to which the peak of its memory is added.

    `before` in it is called once everything is imported; `peak_mb` counts from there.
    """
    frame = """
        import json, resource, sys
        from pipeline.config import Input
        from pipeline.inputs.readers import read
        from pipeline.inputs.shards import discover
        from pipeline.storage import Store

        def peak():  # unlike getrusage, it counts from this program's start, not from its parent's size
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

        arguments = sys.argv[1:]
        before = peak()
        result = {}
        # code
        result["peak_mb"] = peak() - before
        print(json.dumps(result))
    """
    program = textwrap.dedent(frame).replace("# code\n", textwrap.dedent(code))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
