"""How much of what reading and decoding alone allow does the whole path reach, with a predictor that does nothing?

    python -m benchmarks.feeding PHOTOGRAPHS [--shards 8] [--per-shard 1000] [--rounds 3]

The limit: one process per core, each reading tars and decoding them with the same functions, and nothing else. Ours:
the whole run to committed parts, in steady state (from the first block of results to the last), in the same sitting.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import ray
import typer

import pipeline
from benchmarks.photographs import pack
from pipeline.cluster import on_loopback
from pipeline.config import Input, Transform
from pipeline.inputs.shards import discover
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.storage import Store

CORES = len(os.sched_getaffinity(0))


def read_and_decode(url: str) -> int:
    """All images of one tar to pixels; how many there were."""
    config = Input(url=url)
    (shard,) = discover(config, Store())
    blocks = pixel_blocks(read_rows(0, shard, config, Store()), Transform(), config, 128)
    return sum(block.num_rows for block in blocks) - 1  # less the marker at the end


def limit(paths: list[Path]) -> float:
    """Images/s of one process per core, started and warm."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(read_and_decode, [str(paths[0])] * CORES, chunksize=1)
        start = time.perf_counter()
        images = sum(pool.map(read_and_decode, map(str, paths), chunksize=1))
        return images / (time.perf_counter() - start)


def ours(folder: Path) -> float:
    """Images/s of a run with the engine that does nothing."""
    with tempfile.TemporaryDirectory() as output:
        config = {
            "input": {"url": str(folder)},
            "model": {"name": "resnet18", "weights": "IMAGENET1K_V1"},
            "output": {"url": output},
            "runtime": {"engine": "noop"},
        }
        return pipeline.run(config).images_per_s


def main(
    photographs: Path,
    shards: int = 8,
    per_shard: int = 1000,
    rounds: Annotated[int, typer.Option(help="After a warm-up that is not counted.")] = 3,
) -> None:
    with tempfile.TemporaryDirectory(prefix="feeding-") as folder:
        paths = pack(photographs, Path(folder), shards, per_shard)
        with on_loopback():
            ray.init(include_dashboard=False, log_to_driver=False)
        ours(Path(folder))
        figures = [(limit(paths), ours(Path(folder))) for _ in range(rounds)]
    limits, rates = zip(*figures, strict=True)
    print(f"{shards} tars of {per_shard} photographs, {CORES} cores, median of {rounds} rounds")
    print(f"reading and decoding alone: {statistics.median(limits):7,.0f} images/s")
    print(f"the whole path, noop:       {statistics.median(rates):7,.0f} images/s")
    print(f"ratio:                      {statistics.median(r / m for m, r in figures):7.3f}")


if __name__ == "__main__":
    typer.run(main)
