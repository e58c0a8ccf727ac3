"""Temporary folders of commits. Each is locked while its process lives, so that those of killed ones can be told."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import translate

PREFIX = "resnet-batch-commit-"
YOUNG_S = 60.0  # a folder that is younger may not be locked yet


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder of this process for files that are about to be put elsewhere. Raises what a full disk means."""
    try:
        made = tempfile.TemporaryDirectory(prefix=PREFIX)
    except OSError as cause:
        raise translate(
            cause, "make a folder in", os.environ.get("TMPDIR", "the folder for temporary files")
        ) from cause
    with made as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(descriptor)


def sweep_workspaces() -> None:
    """Remove what committers that were killed on this machine have left: up to a whole part each."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is locked, gone, or another user's
            if time.time() - folder.stat().st_mtime > YOUNG_S:
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)
