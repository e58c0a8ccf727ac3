"""The predictor under attack: images that kill its process, and devices that run out of memory."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Input, Transform
from pipeline.deaths import LONE_DEATHS, SPLIT_AFTER, Fate, Notes
from pipeline.errors import FatalError
from pipeline.inputs.stream import pixel_blocks
from pipeline.model import predictor as module
from pipeline.model.engines import OutOfMemory
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.spec import ModelInfo, ModelSpec, make_spec
from pipeline.rows import Columns, Kind, Row
from tests.model.helpers import make_job
from tests.test_deaths import Died, Machine

BATCH = 4
SIDE = 8
TRANSFORM = Transform(resize=None, crop=None)
COLUMNS = Columns(top_k=2, embedding_dtype="float32", embedding_dim=2)
OWN_SIZED = replace(make_spec(make_job(engine="noop")), transform=TRANSFORM)
SPEC = replace(OWN_SIZED, transform=Transform(resize=None, crop=SIDE))
INFO = ModelInfo(3, ("a", "b", "c"), 2)
ADDED = 255  # the colour of poison


def png(colour: int, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (colour, colour, colour)).save(buffer, "PNG")
    return buffer.getvalue()


def block_of(colours: list[int], side: int = SIDE) -> pa.Table:
    """Images of these colours, an error row and the end of their shard."""
    rows = [Row(0, Kind.SAMPLE, index, str(index), png(colour, side)) for index, colour in enumerate(colours)]
    rows += [Row(0, Kind.SAMPLE, len(colours), "broken", b"broken"), Row(0, Kind.END, len(colours) + 1)]
    return pa.concat_tables(pixel_blocks(rows, TRANSFORM, Input(url="in"), 1000)).combine_chunks()


@dataclass
class Computing:
    """An engine made of a function."""

    compute: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    streams: int = 1

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.compute(pixels)


def load(
    monkeypatch: pytest.MonkeyPatch,
    engine: Any,
    notes: Notes | None = None,
    decode: Any = None,
    streams: int = 1,
    *,
    spec: ModelSpec = SPEC,
    batch_size: int = BATCH,
) -> ResNetPredictor:
    """A predictor over an engine that a test brings along."""
    monkeypatch.setattr(module, "load_engine", lambda *_: Computing(engine, streams))
    return ResNetPredictor(spec, INFO, PredictorSettings("eager", "cpu", batch_size, COLUMNS), notes, decode)


def with_kinds(block: pa.Table, before: Kind, after: Kind) -> pa.Table:
    kinds = pa.array([after if kind == before else kind for kind in block["kind"].to_pylist()], pa.uint8())
    return block.set_column(block.schema.get_field_index("kind"), "kind", kinds)


def colour_engine(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Results that tell which image a row is of."""
    colours = pixels[:, 0, 0, 0].astype(np.float32)
    return np.stack([colours, -colours, 0 * colours], axis=1), np.stack([colours, colours + 1], axis=1)


def by_index(pieces: pa.Table) -> dict[tuple[int, int], dict[str, Any]]:
    rows = pieces.to_pylist()
    found = {(row["kind"], row["index"]): row for row in rows}
    assert len(found) == len(rows), "no row stands twice"
    return found


@settings(max_examples=60)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=11), st.sets(st.integers(0, 10), max_size=3), st.booleans())
def test_only_the_images_that_kill_become_error_rows(colours: list[int], poisons: set[int], encoded: bool) -> None:
    """Whoever dies of them: here what decodes on the device, where there is that, and else the network."""
    machine = Machine()
    colours = [ADDED if place in poisons else colour for place, colour in enumerate(colours)]

    def engine(pixels: np.ndarray) -> Any:
        if (pixels[:, 0, 0, 0] == ADDED).any():
            machine.die()
            raise Died
        return colour_engine(pixels)

    def decode(block: pa.Table) -> pa.Table:
        samples = block.filter(pa.array(block["kind"].to_numpy() == Kind.ENCODED))
        if any(pixels.as_py()[0] == ADDED for pixels in samples["pixels"]):
            machine.die()
            raise Died
        return with_kinds(block, Kind.ENCODED, Kind.SAMPLE)

    with pytest.MonkeyPatch.context() as monkeypatch:
        undisturbed = by_index(load(monkeypatch, colour_engine)(block_of(colours)))
        block = with_kinds(block_of(colours), Kind.SAMPLE, Kind.ENCODED) if encoded else block_of(colours)
        for _ in range(100):
            try:
                predictor = load(monkeypatch, engine, machine, decode if encoded else None)
                found = by_index(predictor(block))
                break
            except Died:
                continue
    for place, colour in enumerate(colours):
        if colour == ADDED:
            row = found[Kind.ERROR, place]
            assert (row["stage"], row["error"], row["key"]) == ("predict", "killed_worker", str(place))
            assert row["class_id"] is None
        else:
            assert found[Kind.SAMPLE, place] == undisturbed[Kind.SAMPLE, place], "the others' bits are the same"
    assert found.keys() - {(Kind.ERROR, p) for p in poisons} <= undisturbed.keys()
    assert len(found) == len(colours) + 2
    poisoned_batches = len({place // BATCH for place, colour in enumerate(colours) if colour == ADDED})
    limit = SPLIT_AFTER * (1 + poisoned_batches) + LONE_DEATHS * colours.count(ADDED)
    assert len(machine.dead) <= limit


def test_deaths_that_are_nobodys_fault_never_make_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    deaths = 0

    def engine(pixels: np.ndarray) -> Any:
        nonlocal deaths
        if deaths < 30:
            deaths += 1
            machine.die(Fate.EXCUSED)
            raise Died
        return colour_engine(pixels)

    while True:
        try:
            found = by_index(load(monkeypatch, engine, machine)(block_of([1, 2, 3])))
            break
        except Died:
            continue
    assert [key for key in found if key[0] == Kind.ERROR] == [(Kind.ERROR, 3)]
    assert found[Kind.ERROR, 3]["error"] == "not_an_image"


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_device_that_is_too_small_gets_smaller_batches(
    room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows are the same, and it is said once."""
    asked: list[int] = []

    def engine(pixels: np.ndarray) -> Any:
        asked.append(len(pixels))
        if len(pixels) > room:
            raise OutOfMemory("CUDA out of memory")
        return colour_engine(pixels)

    colours = list(range(1, 12))
    whole = by_index(load(monkeypatch, colour_engine)(block_of(colours)))
    caplog.set_level(logging.WARNING)
    small = load(monkeypatch, engine)
    assert by_index(small(block_of(colours))) == whole
    assert by_index(small(block_of(colours))) == whole
    assert sum(size > room for size in asked) == (2 if room == 1 else 1), "what did not fit is not tried again"
    assert len(caplog.records) == (2 if room == 1 else 1)
    assert "out of device memory" in caplog.text


@pytest.mark.parametrize("room", [2, 0])
def test_a_network_that_is_compiled_for_too_large_a_batch_is_compiled_for_half(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def load_engine(*arguments: Any) -> Computing:
        tried.append(arguments[-1])
        if tried[-1] > room:
            raise OutOfMemory("CUDA out of memory")
        return Computing(colour_engine)

    monkeypatch.setattr(module, "load_engine", load_engine)
    settings = PredictorSettings("compile", "cpu", BATCH, COLUMNS)
    if not room:
        with pytest.raises(OutOfMemory):
            ResNetPredictor(SPEC, INFO, settings)
        return
    found = ResNetPredictor(SPEC, INFO, settings)(block_of([1, 2, 3]))
    assert tried == [BATCH, 2]
    assert by_index(found) == by_index(load(monkeypatch, colour_engine)(block_of([1, 2, 3])))


def in_trouble(pixels: np.ndarray) -> Any:
    import torch

    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Killed(Notes):
    """As if so many had died of whatever is begun."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.reasons = deaths, list[str]()

    def begin(self, work: str) -> int:
        return self.deaths

    def die(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.parametrize("deaths", [0, LONE_DEATHS])
def test_a_process_whose_device_is_in_trouble_for_good_makes_way(deaths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an image would be blamed: any other would have done the same."""
    import torch

    notes = Killed(deaths)
    with pytest.raises(torch.AcceleratorError):
        load(monkeypatch, in_trouble, notes)(block_of([1]))
    assert notes.reasons == ["CUDA error: an illegal memory access was encountered"]


def test_an_image_is_blamed_where_others_go_well(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Killed(LONE_DEATHS)
    found = by_index(load(monkeypatch, colour_engine, notes)(block_of([1])))
    assert found[Kind.ERROR, 0]["error"] == "killed_worker"
    assert notes.reasons == []


def test_a_device_that_holds_not_one_image_ends_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(pixels: np.ndarray) -> Any:
        raise OutOfMemory("CUDA out of memory")

    with pytest.raises(FatalError, match="not enough memory for a single image of 8 x 8 pixels"):
        load(monkeypatch, engine)(block_of([1]))


def test_a_device_that_fails_with_noise_is_not_blamed_on_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def engine(pixels: np.ndarray) -> Any:
        if pixels.shape[1] == 12:
            raise RuntimeError("kernel size 4")
        return in_trouble(pixels)

    notes = Killed(0)
    with pytest.raises(torch.AcceleratorError):
        load(monkeypatch, engine, notes, spec=OWN_SIZED)(block_of([1], side=12))
    assert notes.reasons == ["CUDA error: an illegal memory access was encountered"]


def test_a_device_that_fails_is_not_blamed_on_images(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def engine(pixels: np.ndarray) -> Any:
        if not computed:
            computed.append(1)
            return colour_engine(pixels)
        raise RuntimeError("CUDA error: device-side assert triggered")

    predictor = load(monkeypatch, engine)
    with pytest.raises(RuntimeError, match="device-side assert triggered"):
        predictor(block_of([1] * (BATCH + 1)))


@pytest.mark.parametrize("crop", [None, SIDE])
def test_a_network_that_fails_with_all_images_ends_the_run_with_a_sentence(
    crop: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running again would not help."""

    def engine(pixels: np.ndarray) -> Any:
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    spec = replace(SPEC, transform=Transform(resize=None, crop=crop))
    with pytest.raises(FatalError, match=r"fails with images of 8 x 8 pixels: mat1 and mat2 .*Set model\.transform"):
        load(monkeypatch, engine, spec=spec)(block_of([1] * (BATCH + 1)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("AcceleratorError", "CUDNN_STATUS_ALLOC_FAILED"),
        ("AcceleratorError", "CUDA error: out of memory"),
        ("InductorError", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("RuntimeError", "alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        ("RuntimeError", "GET was unable to find an engine to execute this computation"),
    ],
)
def test_what_libraries_say_for_want_of_memory_is_recognised(error: str, said: str) -> None:
    import torch
    from torch import Tensor

    from pipeline.model.torch_engine import TorchEngine

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise getattr(torch, error, RuntimeError)(said)

    engine = TorchEngine(forward, torch.device("cpu"), None)
    with pytest.raises(OutOfMemory, match=said):
        engine(np.zeros((1, 8, 8, 3), np.uint8))
