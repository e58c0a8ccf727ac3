"""Fixtures of the model tests. Every test has a node's cache of its own."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import JobConfig
from pipeline.model.spec import ModelSpec, make_spec
from pipeline.model.zoo import share_cores
from tests.model.helpers import PRELUDE, FileServer, discriminating_state, make_job

share_cores()  # before a test module imports torch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(folder))
    return folder


@pytest.fixture
def job() -> Callable[..., JobConfig]:
    return make_job


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import torch

    path = tmp_path / "discriminating.pth"
    torch.save(discriminating_state(), path)
    return path


@pytest.fixture
def serve() -> Iterator[Callable[..., FileServer]]:
    servers: list[FileServer] = []

    def start(folder: Path, delay_s: float = 0.0) -> FileServer:
        servers.append(FileServer(folder, delay_s))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def custom(job, tmp_path: Path) -> Callable[..., ModelSpec]:
    """`custom("class Net(Base): …")`: the spec of a network `Net` in a file next to the config."""

    def make(text: str, name: str = "net:Net", **model: Any) -> ModelSpec:
        (tmp_path / "net.py").write_text(PRELUDE + textwrap.dedent(text))
        options = {"weights": "random", "transform": {"resize": None, "crop": 64}, **model}
        return make_spec(job(name=name, directory=tmp_path, **options))

    return make
