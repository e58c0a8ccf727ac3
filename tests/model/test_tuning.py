"""The batch size that a measured curve leads to, and that a node measures a model once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from pipeline.config import JobConfig, make_config
from pipeline.model import tuning
from pipeline.model.engines import OutOfMemory, load_engine
from pipeline.model.spec import make_spec
from pipeline.model.tuning import candidates, choose_batch_size, knee
from pipeline.model.zoo import resolve
from tests.model.test_predictor import SPEC, Computing


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({8: 100.0}, 8),
        ({8: 50.0, 16: 80.0, 32: 98.0, 64: 100.0}, 32),
        ({8: 97.0, 16: 100.0, 32: 100.0}, 8),
        ({8: 114.0, 16: 107.0, 32: 87.0}, 8),
        ({}, 8),
        ({32: 10.0, 64: 20.0, 128: 40.0}, 128),
    ],
)
def test_the_knee_is_the_smallest_batch_that_is_about_as_fast_as_any(curve: dict[int, float], expected: int) -> None:
    assert knee(curve, 8) == expected


@pytest.mark.parametrize(
    ("side", "sizes"), [(32, (8, 32)), (224, (8, 32)), (448, (2, 8)), (600, (1, 4)), (1024, (1,)), (4000, (1,))]
)
def test_large_images_are_tried_alone_on_a_cpu(side: int, sizes: tuple[int, ...]) -> None:
    """Eight of 1024 x 1024 on each of eight streams would take gigabytes."""
    assert candidates("cpu", side) == sizes
    assert candidates("cuda", side) == tuning.CANDIDATES["cuda"]


def config() -> JobConfig:
    return make_config(
        {
            "input": {"url": "."},
            "output": {"url": "."},
            "model": {
                "name": "pipeline.examples.network:digits_resnet20",
                "weights": "random",
                "transform": {"resize": 32, "crop": 32},
            },
        }
    )


def test_a_node_measures_once_and_keeps_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    monkeypatch.setattr(tuning, "LONGEST", 60.0)
    spec = make_spec(config())
    info = resolve(spec)
    chosen = choose_batch_size(spec, info, "eager", "cpu")
    (kept,) = (tmp_path / "cache" / "batch-sizes").glob("*.json")
    found = json.loads(kept.read_text())
    assert set(found["images_per_s"]) == {str(size) for size in tuning.CANDIDATES["cpu"]}
    assert found["batch_size"] == chosen
    kept.write_text(json.dumps(found | {"batch_size": 5}))
    assert choose_batch_size(spec, info, "eager", "cpu") == 5, "it was measured again"
    assert choose_batch_size(spec, info, "noop", "cpu") == tuning.UNMEASURED["cpu"]


def test_what_was_measured_on_another_kind_of_cpu_does_not_count(tmp_path: Path) -> None:
    """As where nodes share a home."""
    for name, flags in (("a", "fpu avx2"), ("b", "fpu avx2 avx512f")):
        (tmp_path / name).write_text(
            "".join(f"processor\t: {n}\nmodel name\t: Xeon\ncpu MHz\t: {n}\nflags\t: {flags}\n\n" for n in range(2))
        )
    assert tuning._processor(tmp_path / "a") == ["model name\t: Xeon", "flags\t: fpu avx2"]
    assert tuning._processor(tmp_path / "b") != tuning._processor(tmp_path / "a")
    assert tuning._processor(tmp_path / "none")


def test_what_the_device_has_no_memory_for_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    room = 16

    def load(name, spec, info, device, batch_size):
        engine = load_engine(name, spec, info, device, batch_size)

        def limited(pixels):
            if len(pixels) > room:
                raise OutOfMemory("too little")
            return engine(pixels)

        return Computing(limited)

    monkeypatch.setattr(tuning, "load_engine", load)
    spec = make_spec(config())
    assert choose_batch_size(spec, resolve(spec), "eager", "cpu") == 8


def test_where_a_batch_takes_long_no_larger_one_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    monkeypatch.setattr(tuning, "LONGEST", 1e-6)
    spec = make_spec(config())
    assert choose_batch_size(spec, resolve(spec), "eager", "cpu") == 8
    (kept,) = (tmp_path / "cache" / "batch-sizes").glob("*.json")
    assert set(json.loads(kept.read_text())["images_per_s"]) == {"8"}


@pytest.mark.parametrize("streams", [1, 3])
def test_an_engine_is_measured_with_all_its_streams(streams: int) -> None:
    at_once, most = set(), 0

    def compute(pixels):
        nonlocal most
        at_once.add(threading.get_ident())
        most = max(most, len(at_once))
        time.sleep(0.01)
        at_once.remove(threading.get_ident())
        return pixels, pixels

    assert tuning.measure_rate(Computing(compute, streams), SPEC, "cpu", 2) > 0
    assert most == streams
