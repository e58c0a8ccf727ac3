"""WebDataset tars whose bytes depend on their content alone, and which are left untouched where they stand already."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Put a tar of `(name, bytes)` at `path`, unless exactly that tar is there.

    Members carry no time, owner or mode of their own. A tar that is right keeps its modification time, so that a
    run sees an unchanged shard; one that is not is replaced by a rename, so that no reader sees half of it.
    """
    data = tar_bytes(members)
    if path.is_file() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """A folder to write into, made if need be. Raises ConfigError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as cause:
        raise ConfigError(f"cannot write into {folder}: {cause.strerror}. Choose another folder.") from cause


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the mode is 0644 unless set
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
