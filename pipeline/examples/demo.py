"""`resnet-batch demo`: real images through the same `run` as everything else, and a result to look at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from pipeline.config import JobConfig, make_config
from pipeline.errors import WeightsError
from pipeline.examples.digits import CHECKPOINT, encode_png, load_digits_images, write_shards
from pipeline.examples.grid import GridSample, save_grid
from pipeline.examples.photos import load_photos, write_photo_shards
from pipeline.outputs.dataset import Dataset, read_table
from pipeline.report import RunReport
from pipeline.running import run
from pipeline.storage import Store
from pipeline.urls import with_absolute_urls

DOUBTFUL = 8  # of the pictures in the grid are the least sure ones
PICTURES = 40

say = Console(soft_wrap=True, highlight=False).print


def run_demo(folder: Path, pretrained: bool = False) -> RunReport:
    """Write shards into `folder`, run, and print what came out. A second time there is nothing to do."""
    return _photos(folder) if pretrained else _digits(folder)


def digits_config(folder: Path) -> JobConfig:
    """The job that labels the digits with a ResNet-20 that was trained on the training part."""
    return make_config(
        {
            "input": {"url": f"{folder}/shards/digits-*.tar"},
            "output": {"url": f"{folder}/labels"},
            "model": {
                "name": "pipeline.examples.network:digits_resnet20",
                "weights": str(CHECKPOINT),
                "classes": [str(digit) for digit in range(10)],
                "transform": {"resize": 32, "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3},
            },
        }
    )


def _digits(folder: Path) -> RunReport:
    digits = load_digits_images()
    shards = write_shards(folder / "shards")
    say(f"[bold]{len(digits.keys):,}[/] handwritten digits in {len(shards)} tar shards: {folder}/shards")
    report = run(with_absolute_urls(digits_config(folder)))
    rows = _rows(f"{folder}/labels")
    held_out = [n for n in range(len(digits.keys)) if digits.held_out[n]]
    samples = [_digit(digits, n, rows[digits.keys[n]]) for n in held_out]
    right = sum(not sample.is_wrong for sample in samples)
    _say_run(report)
    say(f"accuracy on the held-out part: [bold]{right / len(samples):.1%}[/] ({right} of {len(samples)})")
    samples.sort(key=lambda sample: (not sample.is_wrong, sample.score))
    picture = folder / "digits.png"
    save_grid(
        picture, samples[:DOUBTFUL] + samples[DOUBTFUL :: len(samples) // (PICTURES - DOUBTFUL)][: PICTURES - DOUBTFUL]
    )
    _say_where(folder / "labels", picture)
    return report


def _digit(digits: Any, number: int, row: dict[str, Any]) -> GridSample:
    return GridSample(encode_png(digits.images[number]), row["label"], row["score"], str(digits.labels[number]))


def _photos(folder: Path) -> RunReport:
    write_photo_shards(folder / "photo-shards")
    output = f"{folder}/photo-labels"
    config = make_config(
        {
            "input": {"url": f"{folder}/photo-shards/*.tar"},
            "output": {"url": output},
            "model": {"name": "resnet18", "weights": "IMAGENET1K_V1"},
        }
    )
    try:
        report = run(with_absolute_urls(config))
    except WeightsError as cause:
        raise WeightsError(
            f"the pretrained demo downloads ImageNet weights, and this network does not let it: {cause}"
        ) from cause
    _say_run(report)
    rows = _rows(output)
    photos = {name.rpartition(".")[0]: data for name, data in load_photos()}
    picture = folder / "photos.png"
    samples = [GridSample(_thumbnail(photos[key]), row["label"], row["score"]) for key, row in sorted(rows.items())]
    save_grid(picture, samples, columns=4, tile=200)
    _say_where(Path(output), picture)
    return report


def _rows(output: str) -> dict[str, dict[str, Any]]:
    table = read_table(Dataset(output, Store()), "data", ["key", "label", "score"])
    return {row["key"]: row for row in table.to_pylist()}


def _thumbnail(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((400, 400))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _say_run(report: RunReport) -> None:
    if not report.shards_committed:
        say(f"[green]{report.message}[/]")
        return
    say(
        f"labelled [bold]{report.predicted:,}[/] images in {report.seconds:.0f} s, start-up included"
        f" ({report.images_per_s:,.0f} images/s once running; {report.engine} on {report.device})"
    )


def _say_where(output: Path, picture: Path) -> None:
    say(f"the rows are Parquet:  duckdb -c \"select key, label, score from '{output}/data/*.parquet' limit 5\"")  # noqa: S608
    say(f"                or:   python -c \"import pipeline; print(pipeline.read('{output}').to_pandas())\"")
    say(f"the picture:          {picture}")
    say("run it again: there is nothing left to do. Break it off and run it again: it goes on.")
