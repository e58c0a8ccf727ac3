"""ResNet-18 from tars to Parquet: ours, Ray's documented pattern, and the bare network, on the same cores.

    python -m benchmarks.compare PHOTOGRAPHS [--images 1000] [--rounds 3]

The arms run in turn in one sitting, several rounds after a warm-up. Rates are steady state: over the second half of
the images, start-up and what was decoded meanwhile left out on all sides. Ray's pattern is that of its documentation:
`read_webdataset`, a `map` with Pillow and the weights' preset, `map_batches` with an eager network, `write_parquet`;
once as it is, and once with its network on all cores, where Ray gives an actor one.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import typer
from torchvision.models import ResNet18_Weights, resnet18

import pipeline
from benchmarks.photographs import pack
from pipeline.config import make_config
from pipeline.model.engines import choose_engine, load_engine
from pipeline.model.spec import make_spec
from pipeline.model.zoo import resolve

CORES = len(os.sched_getaffinity(0))
BATCH_SIZE = 32
PER_SHARD = 250


def ours(folder: Path, weights: Path, output: Path) -> tuple[float, dict[str, int]]:
    report = pipeline.run(config(folder, weights, output))
    rows = pipeline.read(str(output), ["key", "class_id"]).to_pylist()
    return report.images_per_s, {row["key"]: row["class_id"] for row in rows}


def config(folder: Path, weights: Path, output: Path) -> dict[str, Any]:
    return {
        "input": {"url": f"{folder}/*.tar"},
        "model": {"name": "resnet18", "weights": str(weights)},
        "output": {"url": str(output)},
        "runtime": {"batch_size": BATCH_SIZE},
    }


class Network:
    """Ray's documented predictor: an eager network in an actor."""

    def __init__(self, weights: str, times: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.network = resnet18()
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.network.eval()
        self.times = times

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            classes = self.network(torch.as_tensor(np.stack(batch["image"]))).argmax(dim=1).numpy()
        with Path(self.times).open("a") as file:
            file.write(json.dumps([time.time(), len(classes)]) + "\n")
        return {"key": batch["key"], "class_id": classes}


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    image = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
    return {"key": row["__key__"], "image": ResNet18_Weights.IMAGENET1K_V1.transforms()(image).numpy()}


def rays_pattern(folder: Path, weights: Path, output: Path, threads: int | None = None) -> tuple[float, dict[str, int]]:
    times = output.with_suffix(".times")
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = ray.data.read_webdataset(paths, decoder=None)
    images = samples.map(preprocess)
    predicted = images.map_batches(
        Network,
        fn_constructor_args=(str(weights), str(times), threads),
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    predicted.write_parquet(str(output))
    batches = [json.loads(line) for line in times.read_text().splitlines()]
    late = batches[len(batches) // 2 :]
    rate = sum(count for _, count in late[1:]) / (late[-1][0] - late[0][0])
    rows = pq.read_table(output).to_pylist()
    return rate, {row["key"]: row["class_id"] for row in rows}


def bare_network(folder: Path, weights: Path) -> float:
    """Images/s of our engine alone on decoded pixels, all cores."""
    job = make_config(config(folder, weights, folder / "none"))
    spec = make_spec(job)
    engine = load_engine(choose_engine("auto", "cpu", "float32"), spec, resolve(spec), "cpu", BATCH_SIZE)
    pixels = np.random.default_rng(0).integers(0, 255, (BATCH_SIZE, 224, 224, 3), np.uint8)
    for _ in range(3):
        engine(pixels)
    start = time.perf_counter()
    for _ in range(20):
        engine(pixels)
    return 20 * BATCH_SIZE / (time.perf_counter() - start)


def main(
    photographs: Path,
    images: int = 1000,
    rounds: Annotated[int, typer.Option(help="After a warm-up that is not counted.")] = 3,
) -> None:
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        work = Path(name)
        pack(photographs, work / "shards", images // PER_SHARD, PER_SHARD)
        weights = work / "resnet18.pth"
        torch.manual_seed(0)
        torch.save(resnet18().state_dict(), weights)
        bare = bare_network(work / "shards", weights)  # before there are other processes
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        figures = [play(work, weights, number) for number in range(rounds + 1)][1:]
    mine, pattern, all_cores = (statistics.median(column) for column in zip(*figures, strict=True))
    print(f"ResNet-18, {images} photographs in tars of {PER_SHARD}, {CORES} cores, median of {rounds} rounds, images/s")
    print(f"ours, end to end:                  {mine:7.1f}")
    print(f"Ray's documented pattern:          {pattern:7.1f}   ours is {mine / pattern:.2f}×")
    print(f"the same, its network on all cores:{all_cores:7.1f}   ours is {mine / all_cores:.2f}×")
    print(f"our network alone, without input:  {bare:7.1f}   ours is {mine / bare:.2f}×")


def play(work: Path, weights: Path, number: int) -> tuple[float, float, float]:
    """One round of all arms, in turn; their rows must agree."""
    mine, our_rows = ours(work / "shards", weights, work / f"ours-{number}")
    pattern, their_rows = rays_pattern(work / "shards", weights, work / f"pattern-{number}")
    all_cores, _ = rays_pattern(work / "shards", weights, work / f"all-cores-{number}", CORES)
    assert our_rows.keys() == their_rows.keys()
    same = np.mean([our_rows[key] == their_rows[key] for key in our_rows])
    assert same > 0.99, f"top-1 agrees on {same:.1%} only"
    return mine, pattern, all_cores


if __name__ == "__main__":
    typer.run(main)
