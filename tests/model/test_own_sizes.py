"""Images that come in sizes of their own: which of them share a batch, and which of them is blamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.engines import OutOfMemory
from pipeline.model.tuning import MOST_OF_ONE_SIZE, OWN_SIZES, USUAL_PIXELS, images_at_once
from pipeline.rows import Kind
from tests.model.test_predictor import OWN_SIZED, SIDE, block_of, by_index, colour_engine, load


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
