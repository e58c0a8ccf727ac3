"""The predictor under attack: images that kill its process, and devices that run out of memory."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from pipeline.model.tuning import MOST_OF_ONE_SIZE, OWN_SIZES, USUAL_PIXELS, images_at_once
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


@given(st.integers(0, 512), st.integers(1, 5000), st.integers(1, 5000))
def test_what_pads_a_batch_of_images_of_their_own_size_is_bounded(batch_size: int, height: int, width: int) -> None:
    images = images_at_once(batch_size, height, width)
    assert 1 <= images <= max(batch_size, MOST_OF_ONE_SIZE)
    assert images == 1 or images * height * width <= batch_size * USUAL_PIXELS


def test_tiny_images_share_a_batch_and_photographs_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def engine(pixels: np.ndarray) -> Any:
        shapes.append(pixels.shape[:2])
        return colour_engine(pixels)

    predictor = load(monkeypatch, engine, spec=OWN_SIZED, batch_size=OWN_SIZES["cpu"])
    alone = {side: by_index(predictor(block_of([7], side=side)))[Kind.SAMPLE, 0] for side in (32, 160)}
    assert shapes == [(48, 32), (1, 160)]
    shapes.clear()
    for side in (32, 160):
        found = by_index(predictor(block_of([7] * 50, side=side)))
        assert all(found[Kind.SAMPLE, place]["score"] == alone[side]["score"] for place in range(50))
    assert shapes == [(48, 32)] * 2 + [(1, 160)] * 50, "a batch's size depends on nothing but that of the images"


@pytest.mark.parametrize(("batch_size", "room", "asked"), [(1, 1, [64, 64, 1]), (16, 40, [64, 64, 24])])
def test_tiny_images_that_have_no_room_together_are_computed_in_smaller_batches(
    batch_size: int, room: int, asked: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 40 x 40 pixels: it is not tried in vain with the same number, and said once."""
    sizes: list[int] = []

    def engine(pixels: np.ndarray) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > room:
            raise OutOfMemory("CUDA out of memory")
        return colour_engine(pixels)

    side = 40 if batch_size == 16 else SIDE
    predictor = load(monkeypatch, engine, spec=OWN_SIZED, batch_size=batch_size)
    found = by_index(predictor(block_of([1] * 70, side=side)))
    assert [found[Kind.SAMPLE, place]["class_id"] for place in range(70)] == [0] * 70
    assert sizes[:3] == asked
    assert set(sizes[2:]) == {asked[2]}
    assert len(caplog.records) == 1


def test_an_image_that_has_no_room_makes_no_other_batch_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shapes: list[tuple[int, ...]] = []

    def engine(pixels: np.ndarray) -> Any:
        shapes.append(pixels.shape[:2])
        if pixels.shape[1] == 1000:
            raise OutOfMemory("CUDA out of memory")
        return colour_engine(pixels)

    large = block_of([2], side=1000)
    block = pa.concat_tables([large.set_column(2, "index", pc.add(large["index"], 100)), block_of([1] * 9, side=32)])
    predictor = load(monkeypatch, engine, spec=OWN_SIZED, batch_size=16)
    found = by_index(predictor(block))
    assert found[Kind.ERROR, 100]["error"] == "too_large"
    assert all((Kind.SAMPLE, place) in found for place in range(9))
    assert sorted(set(shapes)) == [(1, 1000), (64, 32)]
    assert shapes.count((1, 1000)) <= 2
    assert caplog.records == []


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


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OutOfMemory("CUDA out of memory"), "too_large"),
        (RuntimeError("kernel size 4"), "unsupported_size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), "unsupported_size"),
    ],
)
def test_an_image_of_a_size_that_the_network_does_not_take_is_an_error_row(
    failure: Exception, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(pixels: np.ndarray) -> Any:
        if pixels.shape[1] == 12:
            raise failure
        return colour_engine(pixels)

    block = pa.concat_tables(
        made.set_column(2, "index", pc.add(made["index"], first))
        for first, made in ((0, block_of([1, 2, 3])), (10, block_of([4, 5], side=12)), (20, block_of([6])))
    )
    rows = {
        row["index"]: row
        for row in load(monkeypatch, engine, spec=OWN_SIZED)(block).to_pylist()
        if row["kind"] != Kind.END
    }
    assert {index for index, row in rows.items() if row["error"] == error} == {10, 11}
    assert {index for index, row in rows.items() if row["class_id"] is not None} == {0, 1, 2, 20}


@pytest.mark.parametrize("taken", [224, 64])
@pytest.mark.parametrize(
    ("failure", "error"),
    [(OutOfMemory("CUDA out of memory"), "too_large"), (RuntimeError("kernel size 4"), "unsupported_size")],
)
def test_an_image_that_comes_first_is_blamed_where_noise_of_a_usual_size_goes_well(
    failure: Exception, error: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which images come, their rows are the same."""
    asked: list[int] = []

    def engine(pixels: np.ndarray) -> Any:
        asked.append(pixels.shape[1])
        if asked[-1] not in (SIDE, taken):
            raise failure
        return colour_engine(pixels)

    predictor = load(monkeypatch, engine, spec=OWN_SIZED)
    for _ in range(2):
        found = by_index(predictor(block_of([4, 5], side=12)))
        assert [found[Kind.ERROR, place]["error"] for place in (0, 1)] == [error] * 2
    assert asked.count(taken) == 1, "once is enough"
    assert (Kind.SAMPLE, 0) in by_index(predictor(block_of([1])))


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
