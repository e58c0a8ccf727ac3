"""The picture of predictions: its size, its red frames, its captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.examples.digits import encode_png
from pipeline.examples.grid import CAPTION, FRAME, GAP, MARGIN, TILE, WRONG, GridSample, save_grid, tile_box

STRIPES = encode_png(np.tile(np.array([0, 255], np.uint8), (8, 4)))
RIGHT, MISTAKEN = GridSample(STRIPES, "7", 0.98, "7"), GridSample(STRIPES, "7", 0.51, "1")


def draw(path, samples, **options) -> Image.Image:
    save_grid(path, samples, **options)
    return Image.open(path).convert("RGB")


def caption(picture: Image.Image, number: int) -> Image.Image:
    left, _, right, bottom = tile_box(number)
    return picture.crop((left, bottom, right, bottom + CAPTION))


def test_grid_is_as_large_as_its_cells(tmp_path):
    picture = draw(tmp_path / "grid.png", [RIGHT] * 40)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert picture.size == (
        2 * MARGIN + 8 * TILE + 7 * GAP,
        2 * MARGIN + 5 * (TILE + CAPTION) + 4 * GAP,
    )
    few = draw(tmp_path / "few.png", [RIGHT] * 3, tile=50)
    assert few.size == (2 * MARGIN + 3 * 50 + 2 * GAP, 2 * MARGIN + 50 + CAPTION)


def test_only_wrong_samples_have_a_red_frame(tmp_path):
    unknown = GridSample(STRIPES, "7", 0.5)
    samples = [RIGHT, MISTAKEN, unknown, *[RIGHT] * 6, MISTAKEN]
    picture = draw(tmp_path / "grid.png", samples)
    framed = []
    for number in range(len(samples)):
        left, top, right, bottom = tile_box(number)
        corners = [(left, top), (right - 1, top), (left, bottom - 1), (right - 1, bottom - 1)]
        red = {picture.getpixel(corner) == WRONG for corner in corners}
        assert len(red) == 1, number
        framed.append(red.pop())
    assert framed == [False, True, False, *[False] * 6, True]


def test_small_images_are_scaled_up_without_blur(tmp_path):
    left, top, right, bottom = tile_box(0)
    tile = draw(tmp_path / "grid.png", [RIGHT]).crop((left + FRAME, top + FRAME, right - FRAME, bottom - FRAME))
    expected = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))).resize(
        tile.size, Image.Resampling.NEAREST
    )
    assert tile.convert("L").tobytes() == expected.tobytes()


def test_caption_tells_label_score_and_truth(tmp_path):
    same, other_score = draw(tmp_path / "a.png", [RIGHT] * 2), [RIGHT, GridSample(STRIPES, "7", 0.5, "7")]
    assert caption(same, 0).tobytes() == caption(same, 1).tobytes()
    changed = draw(tmp_path / "b.png", other_score)
    assert caption(changed, 0).tobytes() != caption(changed, 1).tobytes()
    truths = draw(tmp_path / "c.png", [MISTAKEN, GridSample(STRIPES, "7", 0.51, "4")])
    assert caption(truths, 0).tobytes() != caption(truths, 1).tobytes()


def test_long_labels_stay_in_their_cell(tmp_path):
    long = GridSample(STRIPES, "a label that is far too long for any cell", 0.5, "7")
    alone = draw(tmp_path / "a.png", [RIGHT, RIGHT, RIGHT])
    beside = draw(tmp_path / "b.png", [RIGHT, long, RIGHT])
    for number in (0, 2):
        assert caption(alone, number).tobytes() == caption(beside, number).tobytes()
    assert caption(beside, 1).getcolors(100_000) != caption(alone, 1).getcolors(100_000)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one sample"):
        save_grid(tmp_path / "grid.png", [])
