"""A picture of predictions: a grid of samples, each with its label and score below, wrong ones in a red frame."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN = 24  # around the grid; all lengths are in pixels
GAP = 16  # between cells
TILE = 104  # side of a sample's square, unless asked otherwise; 8x8 pixels fill it at 12 each
FRAME = 4
CAPTION = 24  # height of the line below a tile
FONT_SIZE = 15

PAPER = (255, 255, 255)
EDGE = (226, 229, 234)
INK = (28, 32, 38)
SOFT = (120, 127, 138)
WRONG = (208, 36, 36)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class GridSample:
    """One image file and what was predicted for it; `truth` is its true label, or None where that is not known."""

    image: bytes
    label: str
    score: float
    truth: str | None = None

    @property
    def is_wrong(self) -> bool:
        return self.truth is not None and self.truth != self.label


def save_grid(path: Path, samples: Sequence[GridSample], columns: int = 8, tile: int = TILE) -> None:
    """Draw the samples row by row, in their order, and save the picture as PNG. Raises ValueError without samples.

    `tile` is the side of a sample's square; long labels want a larger one.
    """
    if not samples:
        raise ValueError("a grid needs at least one sample")
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    size = (2 * MARGIN + columns * (tile + GAP) - GAP, 2 * MARGIN + rows * (tile + CAPTION + GAP) - GAP)
    picture = Image.new("RGB", size, PAPER)
    for number, sample in enumerate(samples):
        _draw_cell(picture, sample, tile_box(number, columns, tile))
    picture.save(path, format="PNG", optimize=True)


def tile_box(number: int, columns: int = 8, tile: int = TILE) -> Box:
    """Left, top, right and bottom of the tile of the sample with that number, its frame included."""
    row, column = divmod(number, columns)
    left, top = MARGIN + column * (tile + GAP), MARGIN + row * (tile + CAPTION + GAP)
    return left, top, left + tile, top + tile


def _draw_cell(picture: Image.Image, sample: GridSample, box: Box) -> None:
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    frame = (left, top, right - 1, bottom - 1)  # Pillow counts the last pixel in
    draw.rectangle(frame, fill=EDGE)
    thumbnail = _fitted(sample.image, right - left - 2 * FRAME)
    picture.paste(thumbnail, ((left + right - thumbnail.width) // 2, (top + bottom - thumbnail.height) // 2))
    if sample.is_wrong:
        draw.rectangle(frame, outline=WRONG, width=FRAME)
    _draw_caption(draw, sample, box)


def _fitted(data: bytes, side: int) -> Image.Image:
    """The image as large as fits the square. Small ones keep their pixels visible, large ones are smoothed."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _draw_caption(draw: ImageDraw.ImageDraw, sample: GridSample, box: Box) -> None:
    """`label score`, centred below the tile; `label score (truth)` where it is wrong. A long label is cut short."""
    font = ImageFont.load_default(FONT_SIZE)
    rest = f"  {sample.score:.2f}" + (f" (true {sample.truth})" if sample.is_wrong else "")
    left, _, right, bottom = box
    label = _shortened(sample.label, font, right - left + GAP // 2 - font.getlength(rest))
    x = (left + right - font.getlength(label) - font.getlength(rest)) / 2
    y = bottom + CAPTION // 2
    draw.text((x, y), label, fill=WRONG if sample.is_wrong else INK, font=font, anchor="lm")
    draw.text((x + font.getlength(label), y), rest, fill=WRONG if sample.is_wrong else SOFT, font=font, anchor="lm")


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"
