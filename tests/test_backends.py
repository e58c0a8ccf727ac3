"""What only a local disk has: temporary files and their sweeping, links, folders that can't be read."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import backends
from pipeline.backends import LocalDisk, Opened
from pipeline.config import Storage
from pipeline.errors import AccessDenied, ConfigError, FatalError, NotFound, StoreUnavailable
from pipeline.storage import Store

# Writes half of a file and says so; goes on when it is told to.
HALF_A_PUT = """
import sys
import tempfile
from pathlib import Path
from pipeline import backends

class Slow(backends._Temporary):
    def fill(self, data):
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        print("half", flush=True)
        sys.stdin.readline()
        self._file.seek(0)
        return super().fill(data)

backends._Temporary = Slow
backends.LocalDisk().put("file://" + sys.argv[1], b"x" * 1000)
"""


@contextmanager
def half_a_put(target: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written half of `target`."""
    writer = subprocess.Popen(
        [sys.executable, "-c", HALF_A_PUT, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        yield writer
    finally:
        writer.kill()
        writer.communicate()


# --- Temporary files -----------------------------------------------------------------------------------------------


def test_what_is_half_written_is_in_no_listing(tmp_path: Path) -> None:
    target = tmp_path / "data" / "x.parquet"
    store = Store()
    with half_a_put(target) as writer:
        (temporary,) = target.parent.iterdir()
        assert list(target.parent.glob("*.parquet")) == []
        assert store.find(str(tmp_path)) == list(store.each_match(f"{tmp_path}/**")) == []
        assert store.starting_with(f"{target.parent}/") == []
        with pytest.raises(NotFound):
            store.info(str(temporary))
        writer.communicate(b"go on\n")
    assert writer.returncode == 0
    assert target.read_bytes() == b"x" * 1000
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("folder", [".", "data", "_runs/1"])
def test_what_a_killed_writer_leaves_is_swept(tmp_path: Path, folder: str) -> None:
    target = tmp_path / folder / "x"
    with half_a_put(target) as writer:
        Store().sweep(str(tmp_path))
        (temporary,) = target.parent.glob(".*.tmp")  # its writer lives
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert temporary.exists()
        Store().sweep(str(tmp_path))
        assert not temporary.exists()
    assert not target.exists()


def test_temporary_files_of_others_are_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in (".x.tmp", "x.tmp", f".{'a' * 33}.tmp"):
        (tmp_path / "data" / name).write_bytes(b"x")
    Store().sweep(str(tmp_path))
    assert len(list((tmp_path / "data").iterdir())) == len(Store().find(str(tmp_path))) == 3


def test_a_writer_that_is_swept_before_it_has_its_lock_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    swept: list[object] = []

    def flock(file: object, operation: int) -> None:
        if not swept:
            swept.append(file)
            backends.sweep(tmp_path)
        real(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    Store().put(str(tmp_path / "data" / "x"), b"content")
    assert len(swept) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["x"]


def test_a_put_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """The file size limit stands for a full disk."""
    Store().put(str(tmp_path / "x"), b"old")
    code = """
import resource, sys
from pipeline.config import Storage
from pipeline.storage import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
Store(Storage(deadline_s=0.1)).put(sys.argv[1], b"n" * 2**20)
"""
    failed = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert "StoreUnavailable: cannot write" in failed.stderr
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_without_hard_links_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:  # what Linux says where a file system has none
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FatalError, match=r"has no hard links\. .* Use another place"):
        Store().put_if_absent(str(tmp_path / "_dataset.json"), b"{}")
    assert not list(tmp_path.iterdir())


def test_two_contents_never_share_a_version(tmp_path: Path) -> None:
    """Though they have one size and are written within one tick of the file system's clock."""
    store = Store()
    versions = {store.put(str(tmp_path / f"{number % 2}"), str(number % 10).encode()) for number in range(100)}
    assert len(versions) == 100


# --- Folders -------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "x").write_bytes(b"content")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "file").symlink_to(tmp_path / "elsewhere" / "deep" / "x")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    found = Store().find(str(folder))
    assert [info.url for info in found] == [f"file://{folder}/file", f"file://{folder}/linked/deep/x"]
    assert {info.size for info in found} == {7}
    for name in ("dangling", "pipe"):
        with pytest.raises(NotFound):
            Store().info(f"{folder}/{name}")


def test_folders_that_lead_into_themselves_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="symbolic links"):
        Store().find(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment")
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o711])
def test_a_folder_that_cannot_be_read_is_an_error_and_not_empty(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        closed = Path(folder, "open", "closed")
        closed.mkdir(parents=True)
        (closed / "x").write_bytes(b"x")
        closed.chmod(mode)
        Path(folder).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(AccessDenied, match=r"cannot list .*Permission denied.*permissions"):
                Store().find(folder)
            with pytest.raises(AccessDenied, match="cannot write"):
                Store().put(f"{folder}/open/y", b"")
        finally:
            os.seteuid(0)


def test_a_glob_does_not_look_deeper_than_its_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b/c", "a/x.tar", "d/y.tar"):
        Store().put(str(tmp_path / name / "z.tar"), b"")
    visited: list[str] = []
    real = os.scandir

    def scandir(path: str) -> object:
        visited.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    list(Store().each_match(f"{tmp_path}/a*/*.tar"))
    assert visited == [str(tmp_path), str(tmp_path / "a")]


def test_a_busy_disk_is_tried_again_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store().put(str(tmp_path / "x"), b"content")
    attempts: list[int] = []

    def stale(found: os.stat_result) -> str:
        attempts.append(1)
        raise OSError(errno.ESTALE, "Stale file handle")  # what NFS answers while its server is away

    monkeypatch.setattr(backends, "_version_of", stale)
    with pytest.raises(StoreUnavailable, match="Stale"):
        Store(Storage(deadline_s=0.5)).read(str(tmp_path / "x"))
    assert len(attempts) > 1


class Failing(io.RawIOBase):
    """A disk that delivers a part of what is asked for, and then fails once."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place, self._left = content, 0, [1000, OSError(errno.EIO, "Input/output error")]

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._place = (offset, self._place + offset, len(self._content) + offset)[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        step = self._left.pop(0) if self._left else len(buffer)
        if isinstance(step, OSError):
            raise step
        data = self._content[self._place : self._place + min(len(buffer), step)]
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def test_a_read_that_fails_half_way_is_repeated_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(100_000)
    (tmp_path / "x").write_bytes(content)
    opened = Opened(io.BufferedReader(Failing(content), 16), "1", len(content))  # type: ignore[arg-type]
    monkeypatch.setattr(LocalDisk, "open", lambda *_: opened)
    with Store().open(str(tmp_path / "x")) as file:
        assert file.read(50_000) + file.read() == content


def test_temporary_files_that_cannot_be_looked_at_stop_nobody(tmp_path: Path) -> None:
    (tmp_path / f".{'a' * 32}.tmp").mkdir()  # as where the disk is read-only: an error of its own kind
    Store().sweep(str(tmp_path))
    assert list(backends.leftovers(tmp_path)) == []
