"""Engines against plain torch: right numbers, and rows that depend on their pixels alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models import resnet18

from pipeline.errors import ConfigError
from pipeline.model import torch_engine
from pipeline.model.engines import Engine, load_engine, num_cores
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.spec import ModelInfo, ModelSpec, make_spec
from pipeline.model.torch_engine import TorchEngine, compile_options
from pipeline.model.zoo import build, resolve
from pipeline.rows import Columns
from tests.model.helpers import (
    NUM_CLASSES,
    SIZE,
    discriminating_state,
    make_job,
    normalised,
    photographs,
)
from tests.model.test_predictor import block_of

BATCH_SIZE = 16
ENGINES = ["eager", "compile", "openvino"]

Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`load("eager", precision=…, batch_size=…, crop=…)`: that engine with the network that discriminates, once."""
    folder = tmp_path_factory.mktemp("engines")
    path = folder / "net.pth"
    torch.save(discriminating_state(), path)

    @functools.cache
    def load(name: str, precision: str = "float32", batch_size: int = BATCH_SIZE, crop: int | None = SIZE) -> Engine:
        transform = {"resize": crop, "crop": crop}
        spec = make_spec(make_job(name="resnet18", weights=str(path), precision=precision, transform=transform))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RESNET_BATCH_CACHE", str(folder / "cache"))  # one for all, so that it is converted once
            return load_engine(name, spec, resolve(spec), "cpu", batch_size)

    return load


@functools.cache
def reference() -> tuple[np.ndarray, np.ndarray]:
    """Logits and embeddings of all photographs by plain torchvision: fp32, eager, contiguous."""
    network = resnet18(num_classes=NUM_CLASSES)
    network.load_state_dict(discriminating_state())
    pooled: list[torch.Tensor] = []
    network.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    with torch.inference_mode():
        logits = network.eval()(normalised(photographs()))
    return logits.numpy(), pooled[0].numpy()


def run(engine: Engine, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    results = [engine(pixels[start : start + BATCH_SIZE]) for start in range(0, len(pixels), BATCH_SIZE)]
    return np.concatenate([logits for logits, _ in results]), np.concatenate([rows for _, rows in results])


def centred(embeddings: np.ndarray) -> np.ndarray:
    """Unit vectors after subtracting the reference's mean: raw cosines are near 1 even between different images."""
    vectors = embeddings - reference()[1].mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def agreement(engine: Engine) -> tuple[float, float]:
    """Share of equal top-1 classes, and the lowest centred cosine between an embedding and the reference's."""
    logits, embeddings = run(engine, photographs())
    top1 = (logits.argmax(axis=1) == reference()[0].argmax(axis=1)).mean()
    return float(top1), float((centred(embeddings) * centred(reference()[1])).sum(axis=1).min())


def test_the_reference_tells_photographs_apart():
    """Otherwise the agreement below would show nothing."""
    logits, embeddings = reference()
    assert len(np.unique(logits.argmax(axis=1))) >= 15
    cosines = (centred(embeddings) @ centred(embeddings).T)[~np.eye(len(embeddings), dtype=bool)]
    assert np.median(cosines) < 0.2


@pytest.mark.parametrize("name", ENGINES)
def test_the_numbers_are_the_references(load: Load, name: str):
    top1, cosine = agreement(load(name))
    assert top1 == 1.0
    assert cosine >= 0.99999


@pytest.mark.parametrize(("name", "precision"), [("eager", "bfloat16"), ("eager", "float16"), ("openvino", "bfloat16")])
def test_a_lower_precision_is_applied_and_close(load: Load, name: str, precision: str):
    try:
        engine = load(name, precision)
    except ConfigError as error:
        assert "this CPU computes in f32" in str(error)
        pytest.skip(str(error))
    top1, cosine = agreement(engine)
    assert top1 >= 0.9
    assert 0.99 <= cosine < 0.999999


CASES = [(name, "float32", BATCH_SIZE) for name in ENGINES]
CASES += [(name, "float32", size) for name in ("eager", "openvino") for size in (1, 5, 11)]
CASES += [("eager", "bfloat16", 7), ("openvino", "bfloat16", 7)]


@pytest.mark.parametrize(("name", "precision", "batch_size"), CASES)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(load: Load, name: str, precision: str, batch_size: int):
    try:
        engine = load(name, precision, batch_size)
    except ConfigError as error:
        pytest.skip(str(error))
    pixels, others = photographs()[:batch_size], photographs()[-batch_size:]
    expected = engine(pixels)
    assert [rows.dtype for rows in expected] == [np.float32, np.float32]
    places = np.arange(batch_size)
    for shift, neighbours, kept in (
        (1, others, places >= 0),  # only moved
        (batch_size // 2, others, places % 2 == 0),
        (3, np.zeros_like(others), places % 2 == 1),
        (batch_size - 1, others, places == batch_size - 1),
    ):
        moved = np.roll(places, shift)
        batch = np.where(kept[:, None, None, None], pixels[moved], neighbours)
        for found, rows in zip(engine(batch), expected, strict=True):
            assert found[kept].tobytes() == rows[moved][kept].tobytes()


@pytest.mark.parametrize("name", ["eager", "openvino", pytest.param("compile", marks=pytest.mark.slow)])
def test_without_a_size_every_size_is_taken(load: Load, name: str):
    engine, plain = load(name, batch_size=8, crop=None), load("eager", batch_size=8)
    first: list[bytes] = []
    for height, width in ((SIZE, SIZE), (96, 64), (64, 96), (SIZE, SIZE)):
        pixels = np.ascontiguousarray(photographs()[:8, :height, :width])
        for found, expected in zip(engine(pixels), plain(pixels), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-3)
        first.append(engine(pixels)[1].tobytes())
    assert first[0] == first[3]


@pytest.mark.slow
def test_what_is_compiled_takes_photographs_of_any_size(load: Load):
    engine = load("compile", batch_size=1, crop=None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for height, width in ((375, 500), (500, 333), (400, 400), (600, 800)):
            engine(np.zeros((1, height, width, 3), np.uint8))


@pytest.mark.parametrize("name", ["eager", "openvino"])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 48])
def test_among_images_of_their_own_size_a_row_does_not_depend_on_its_neighbours(load: Load, name: str, batch_size: int):
    engine = load(name, batch_size=1, crop=None)
    for height, width in ((SIZE, SIZE), (90, 61)):
        pixels = np.resize(photographs()[:, :height, :width], (batch_size, height, width, 3))
        expected = engine(pixels)
        for place in {0, batch_size // 2, batch_size - 1}:
            moved = np.roll(pixels, place, axis=0)
            black = np.zeros_like(moved)
            black[place] = moved[place]
            for found, lone, rows in zip(engine(moved), engine(black), expected, strict=True):
                assert np.roll(found, -place, axis=0).tobytes() == rows.tobytes()
                assert lone[place].tobytes() == rows[0].tobytes()


@pytest.mark.parametrize("name", ENGINES)
def test_pixels_may_be_read_only_and_results_are_the_callers(load: Load, name: str):
    engine = load(name)
    pixels = photographs()[:BATCH_SIZE].copy()
    pixels.flags.writeable = False
    results = engine(pixels)
    before = [rows.copy() for rows in results]
    engine(photographs()[-BATCH_SIZE:].copy())
    for rows, earlier in zip(results, before, strict=True):
        assert np.array_equal(rows, earlier)


def test_what_is_compiled_for_a_gpu_names_options_that_torch_has():
    """torch.compile refuses others, before it compiles."""
    for size in (SIZE, None):
        torch.compile(lambda x: x, options=compile_options("cuda", size))
    assert compile_options("cuda", SIZE)["triton.cudagraphs"]


def test_what_is_compiled_has_the_weights_as_constants(monkeypatch: pytest.MonkeyPatch):
    """So torch can fold batch norms into them and lay them out once."""
    networks: list[nn.Module] = []

    def load_eager(spec: ModelSpec, device: str) -> TorchEngine:
        engine = eager(spec, device)
        networks.append(engine.forward)
        return engine

    eager = torch_engine.load_eager
    monkeypatch.setattr(torch_engine, "load_eager", load_eager)
    spec = make_spec(
        make_job(
            name="pipeline.examples.network:digits_resnet20", weights="random", transform={"resize": 32, "crop": 32}
        )
    )
    engine = load_engine("compile", spec, resolve(spec), "cpu", 4)
    pixels = photographs()[:4, :32, :32]
    expected = engine(pixels)
    with torch.no_grad():
        for weights in networks[0].parameters():
            if weights.ndim == 4:  # of convolutions; what is not folded stays the very tensor
                weights.zero_()
    for found, rows in zip(engine(pixels), expected, strict=True):
        assert np.array_equal(found, rows)


def test_a_batch_that_lies_on_the_device_is_computed_where_it_is(load: Load):
    engine = load("eager")
    assert isinstance(engine, TorchEngine)
    assert engine.resident(photographs()[:8])().tolist() == [True] * 8


def test_blocks_of_any_length_do_not_compile_again(load: Load, monkeypatch: pytest.MonkeyPatch):
    engine = load("compile")
    monkeypatch.setattr("pipeline.model.predictor.load_engine", lambda *_: engine)
    info = ModelInfo(NUM_CLASSES, None, 512)
    settings = PredictorSettings("compile", "cpu", BATCH_SIZE, Columns(3, "float16", 512))
    predictor = ResNetPredictor(make_spec(make_job(engine="noop")), info, settings)
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] >= 1
    for length in (1, 3, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 5):
        assert predictor(block_of(list(range(length)), SIZE)).num_rows == length + 2
    assert dict(counters["stats"]) == compiled


def test_weights_converted_once_give_what_autocast_gives(checkpoint: Path):
    spec = make_spec(make_job(name="resnet18", weights=str(checkpoint), precision="bfloat16"))
    converted = load_engine("eager", spec, resolve(spec), "cpu", 8)
    assert isinstance(converted, TorchEngine)
    assert {p.dtype for p in converted.forward.parameters()} == {torch.bfloat16, torch.float32}  # of batch norm
    plain = TorchEngine(build(spec).to(memory_format=torch.channels_last), torch.device("cpu"), torch.bfloat16)
    for found, expected in zip(converted(photographs()[:8]), plain(photographs()[:8]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 2), ("max 100000\n", None), ("100 100000\n", 1), (None, None)]
)
def test_a_containers_quota_counts(tmp_path: Path, text: str | None, cores: int | None):
    """None: as many as it may run on."""
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    all_cores = len(os.sched_getaffinity(0))
    assert num_cores(tmp_path / "cpu.max") == min(cores or all_cores, all_cores)


def test_eager_uses_all_cores_that_it_may(load: Load):
    torch.set_num_threads(1)
    load("eager", batch_size=2)
    assert torch.get_num_threads() == num_cores()
    assert torch.get_float32_matmul_precision() == "highest"
