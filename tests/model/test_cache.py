from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config import Storage
from pipeline.errors import AccessDenied, FatalError, WeightsError
from pipeline.model.cache import cache_directory, fetch, keep, new_file, new_folder, recall
from pipeline.model.torch_engine import _compiler_cache
from pipeline.storage import Store
from tests.model.helpers import output_of, python

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()
FETCH = """
import sys
from pipeline.config import Storage
from pipeline.model.cache import fetch
print(fetch(sys.argv[1], Storage(), sys.argv[2]))
"""


def test_two_processes_at_once_fetch_once(tmp_path: Path, cache: Path, serve):
    (tmp_path / "net.pth").write_bytes(DATA)
    server = serve(tmp_path, delay_s=0.3)
    alone = fetch(f"{server.url}/net.pth", Storage(), SHA256)
    for_one = len(server.downloads)
    alone.unlink()
    server.downloads.clear()
    both = [python(FETCH, f"{server.url}/net.pth", SHA256) for _ in range(2)]
    assert {output_of(process) for process in both} == {str(cache / "weights" / f"{SHA256}.pth")}
    assert len(server.downloads) == for_one > 0
    assert alone.read_bytes() == DATA


def test_the_driver_learns_the_hash_and_workers_use_its_copy(tmp_path: Path, serve):
    (tmp_path / "net.safetensors").write_bytes(DATA)
    server = serve(tmp_path)
    path = fetch(f"{server.url}/net.safetensors?signature=x", Storage())
    assert path.name == f"{SHA256}.safetensors"
    server.downloads.clear()
    assert fetch(f"{server.url}/net.safetensors?signature=x", Storage(), SHA256) == path
    assert server.downloads == []


def test_a_cache_that_was_filled_beforehand_is_only_read(tmp_path: Path, cache: Path, serve, caplog):
    (tmp_path / "net.pth").write_bytes(DATA)
    server = serve(tmp_path)
    path = fetch(f"{server.url}/net.pth", Storage(), SHA256)
    shutil.rmtree(cache / "locks")
    (cache / "locks").write_text("")  # so that nobody can take a lock
    assert fetch(f"{server.url}/net.pth", Storage(), SHA256) == path
    with pytest.raises(FatalError, match="cannot write to the cache directory"):
        fetch(f"{server.url}/net.pth", Storage())
    (cache / "models").write_text("")
    keep("models", "a", 1)
    assert "found again in every process: cannot write to the cache directory" in caplog.text


def test_what_cannot_be_read_is_found_again(cache: Path, caplog):
    keep("info", "a", {"classes": 3})
    assert recall("info", "a") == {"classes": 3}
    (cache / "info" / "a.json").write_text('{"cla')
    (cache / "info" / "b.json").mkdir()
    assert recall("info", "a") is recall("info", "b") is recall("info", "c") is recall("none", "a") is None
    assert caplog.text.count("cannot read") == 2


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, serve):
    (tmp_path / "net.pth").write_bytes(DATA)
    url = f"{serve(tmp_path).url}/net.pth"
    path = fetch(url, Storage(), SHA256)
    path.write_bytes(DATA[:1000])
    assert fetch(url, Storage(), SHA256).read_bytes() == DATA


def test_another_file_than_expected_is_refused_and_not_kept(tmp_path: Path, cache: Path, serve):
    (tmp_path / "net.pth").write_bytes(DATA + b"x")
    with pytest.raises(WeightsError, match=rf"net.pth have the sha256 [0-9a-f]{{64}}, expected was {SHA256}"):
        fetch(f"{serve(tmp_path).url}/net.pth?signature=secret", Storage(), SHA256)
    assert list((cache / "weights").iterdir()) == []


def test_what_cannot_be_fetched_is_one_sentence_without_the_signature(tmp_path: Path, serve):
    url = f"{serve(tmp_path).url}/gone.pth"
    with pytest.raises(WeightsError) as caught:
        fetch(f"{url}?signature=secret", Storage(), None)
    assert str(caught.value).startswith(f"cannot fetch the weights: cannot open {url}: ")
    assert "secret" not in str(caught.value)
    assert "give the file's path" in str(caught.value)


def test_a_dead_server_is_a_weights_error_too(tmp_path: Path, serve):
    server = serve(tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsError, match=r"cannot fetch the weights"):
        fetch(f"{server.url}/net.pth", Storage(deadline_s=0.1, connect_timeout_s=1.0), None)


def test_a_refusal_is_raised_as_it_is_and_is_not_its_own_cause(monkeypatch: pytest.MonkeyPatch):
    """Who asks for the cause of the cause would never come to an end."""
    denied = AccessDenied("cannot open s3://private/net.pth")
    monkeypatch.setattr(Store, "open", Mock(side_effect=denied))
    with pytest.raises(AccessDenied) as caught:
        fetch("s3://private/net.pth", Storage())
    assert caught.value is denied
    assert denied.__cause__ is None


def test_nothing_half_written_gets_a_name(tmp_path: Path):
    for new in (new_file, new_folder):
        target = tmp_path / new.__name__ / "target"
        target.parent.mkdir()
        with pytest.raises(KeyboardInterrupt), new(target) as temporary:
            raise KeyboardInterrupt
        assert not temporary.exists()
        assert list(target.parent.iterdir()) == []


def test_a_killed_writer_leaves_no_name(tmp_path: Path):
    code = """
import os, pathlib, signal, sys
from pipeline.model.cache import lock, new_folder
with lock("x"), new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path / "target").wait(60) == -9
    assert not (tmp_path / "target").exists()
    with new_folder(tmp_path / "target") as folder:  # and no lock that outlives it
        (folder / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["whole"]


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(FatalError, match=r"cannot write to the cache directory .*Set RESNET_BATCH_CACHE"):
        cache_directory("weights")


def test_what_a_killed_compiler_left_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path))
    half, whole = tmp_path / "inductor" / "key" / "half.so", tmp_path / "inductor" / "key" / "whole.so"
    killed = _compiler_cache("key")
    killed.__enter__()
    half.touch()
    killed.__exit__(SystemExit, SystemExit(), None)
    assert half.exists()
    with _compiler_cache("key"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(half.parent)
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == half.parent
        assert not half.exists()
        whole.touch()
    with _compiler_cache("key"):
        assert whole.exists()
