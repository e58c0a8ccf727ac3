"""How much of what reading and decoding alone allow does the whole path reach, with a predictor that does nothing?

    python -m benchmarks.feeding PHOTOGRAPHS [--shards 16 --per-shard 1000] [--rounds 3]

The limit: one process per core, each reading tars and decoding them with the same functions, and nothing else. Ours:
the whole run to committed parts, in steady state (over the second half of the images), in the same sitting. Then what
each kind of process took of the cores, and the memory of a decoder: PSS less its part of Ray's object store.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer

import pipeline
from benchmarks.measuring import pss_mb
from benchmarks.photographs import pack
from pipeline.cluster import connected
from pipeline.config import Input, JobConfig, Transform, make_config
from pipeline.inputs.shards import discover
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.storage import Store

CORES = len(os.sched_getaffinity(0))
EVERY_S = 0.5
DECODER = "ray::Read"


def read_and_decode(url: str) -> tuple[int, float]:
    """All images of one tar to pixels: how many there were, and CPU seconds."""
    config, begun = Input(url=url), time.process_time()
    (shard,) = discover(config, Store())
    blocks = pixel_blocks(read_rows(0, shard, config, Store()), Transform(), config, 128)
    images = sum(block.num_rows for block in blocks) - 1  # less the marker at the end
    return images, time.process_time() - begun


def limit(paths: list[Path]) -> float:
    """Images/s of one process per core, started and warm."""
    return _limit(paths)[0]


def _limit(paths: list[Path]) -> tuple[float, float]:
    """Images/s of one process per core, and CPU milliseconds per image."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(read_and_decode, [str(paths[0])] * CORES, chunksize=1)
        start = time.perf_counter()
        done = pool.map(read_and_decode, map(str, paths), chunksize=1)
        seconds = time.perf_counter() - start
    images, cpu = map(sum, zip(*done, strict=True))
    return images / seconds, cpu / images * 1000


def job(folder: str, output: str) -> JobConfig:
    """A run with the engine that does nothing."""
    model = {"name": "resnet18", "weights": "IMAGENET1K_V1"}
    return make_config(
        {"input": {"url": folder}, "model": model, "output": {"url": output}, "runtime": {"engine": "noop"}}
    )


def ours(folder: str) -> float:
    """Images/s of a run, in its steady state. SystemExit where it was not all that it should be."""
    with tempfile.TemporaryDirectory() as output:
        report = pipeline.run(job(folder, output))
    if report.exit_code or report.errors or not report.images_per_s:
        raise SystemExit(f"{report.errors} of {report.errors + report.predicted} images are errors: {report.message}")
    return report.images_per_s


class Profile(threading.Thread):
    """CPU seconds by kind of process from now on, and the greatest memory of a decoder in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.samples: list[tuple[float, dict[int, tuple[str, float]]]] = []
        self.decoder_mb = 0.0

    def run(self) -> None:
        while not self.stopped.wait(EVERY_S):
            found = {}
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error):
                    name = _kind(process)
                    times = process.cpu_times()
                    found[process.pid] = (name, times.user + times.system)
                    if name.startswith(DECODER):
                        self.decoder_mb = max(self.decoder_mb, pss_mb(process.pid, with_shared=False))
            self.samples.append((time.perf_counter(), found))

    def cores(self) -> Counter[str]:
        """Cores by kind of process, over the middle of the run."""
        (start, before), (end, after) = (self.samples[int(len(self.samples) * share)] for share in (0.4, 0.85))
        cores: Counter[str] = Counter()
        for pid, (name, seconds) in after.items():
            cores[name] += (seconds - before.get(pid, ("", 0.0))[1]) / (end - start)
        return cores


def _kind(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "driver"
    words = process.cmdline() or [process.name()]
    return words[0].rsplit("/")[-1].split("(")[0].split(".")[0] if words[0].startswith("ray::") else "Ray's own"


def main(
    photographs: Path,
    shards: int = 16,
    per_shard: int = 1000,
    rounds: Annotated[int, typer.Option(help="After a warm-up that is not counted.")] = 3,
) -> None:
    with tempfile.TemporaryDirectory(prefix="feeding-") as folder:
        paths = pack(photographs, Path(folder), shards, per_shard)
        with connected(job(folder, "unused")):  # the Ray of a run's own, for all of them: a new one has to warm up
            ours(folder)
            profile = Profile()
            profile.start()
            profiled = ours(folder)
            profile.stopped.set()
            figures = [(*_limit(paths), ours(folder)) for _ in range(rounds)]
    limits, cpu, rates = zip(*figures, strict=True)
    print(f"{shards} tars of {per_shard} photographs, {CORES} cores, median of {rounds} rounds")
    print(
        f"reading and decoding alone: {statistics.median(limits):7,.0f} images/s, {statistics.median(cpu):.2f} ms each"
    )
    print(f"the whole path, noop:       {statistics.median(rates):7,.0f} images/s")
    print(f"ratio:                      {statistics.median(r / m for m, _, r in figures):7.3f}")
    print(f"a decoder's memory:         {profile.decoder_mb:7,.0f} MB at the most")
    print(f"profile of a run with {profiled:,.0f} images/s:")
    for name, cores in profile.cores().most_common(8):
        print(f"  {name:40} {cores:6.3f} cores {cores / profiled * 1000:7.3f} ms an image")


if __name__ == "__main__":
    typer.run(main)
