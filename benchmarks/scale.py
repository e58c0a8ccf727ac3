"""What grows with the number of shards, samples and bytes? Memory and CPU time of planning, of the flow, of one tar.

    python -m benchmarks.scale planning [--shards 1000000]
    python -m benchmarks.scale flow     [--shards 100 --shards 1000 ...] [--per-shard 100]
    python -m benchmarks.scale tar      PHOTOGRAPHS [--gigabytes 5]

Everything is measured in processes of their own. Memory is PSS without the pages of Ray's object store, which Ray
bounds; CPU time is user and system of the whole process tree, so that a busy machine changes it little.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from PIL import Image

import pipeline
from benchmarks.million import CONFIG, listed_from, make_listings
from benchmarks.processes import Tree
from pipeline.cluster import on_loopback
from pipeline.config import Input, make_config
from pipeline.examples.tars import write_tar
from pipeline.inputs.shards import discover
from pipeline.outputs.commit import describe
from pipeline.outputs.progress import Progress
from pipeline.planning import make_plan
from pipeline.rows import Kind
from pipeline.storage import Store

app = typer.Typer(add_completion=False)
MB = 2**20
RECEIPTS = 200_000
SMALL_FILES = 100_000


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a Markdown table."""
    lines = [list(header), ["---"] * len(list(header)), *([str(cell) for cell in row] for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def alone(step: str, *arguments: Any, tree: Tree | None = None) -> Any:
    """What `step` of this module answers in a new process, which `tree` watches."""
    command = [sys.executable, "-m", "benchmarks.scale", "once", step, json.dumps(arguments, default=str)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with tree.watching(process.pid) if tree is not None else nullcontext():
            output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"{step} ended with {process.returncode}")
    return json.loads(output.strip().splitlines()[-1])


@app.command(hidden=True)
def once(step: str, arguments: str) -> None:
    """Run one step in this process."""
    print(json.dumps(STEPS[step](*json.loads(arguments))))


# --- Planning --------------------------------------------------------------------------------------------------------


@app.command()
def planning(shards: int = 1_000_000, files: int = SMALL_FILES) -> None:
    """Plan over many shards, nearly all of them done; list many small files; count receipts."""
    with scratch() as folder:
        rows = []
        for name, done in (("0.1 % new", shards - shards // 1000), ("all new", 0)):
            (folder / name).mkdir()
            alone("listings", folder / name, shards, done)
            rows.append((f"{shards:,} tars, {name}", *measured(alone("plan", folder / name), shards)))
        (folder / "files").mkdir()
        alone("small_files", folder / "files", files)
        rows.append(
            (f"{files:,} small files on the local disk", *measured(alone("list_files", folder / "files"), files))
        )
    table(("planning", "to do", "CPU s", "wall s", "peak RSS, MB", "of it per entry, bytes"), rows)
    print()
    table(("receipts", "rows in each", "CPU µs per receipt", "receipts/s on a core"), alone("receipts", RECEIPTS))
    print()
    rows = [alone("ray_tasks", count) for count in (1000, 4000)]
    table(("Ray Data's read tasks", "s to the first block", "CPU ms per task, driver", "kB per task, driver"), rows)


def measured(found: dict[str, float], entries: int) -> tuple[str, ...]:
    grown = (found["peak"] - found["base"]) * MB / entries
    return (
        f"{found['tasks']:,}",
        f"{found['cpu']:.1f}",
        f"{found['wall']:.1f}",
        f"{found['peak']:,.0f}",
        f"{grown:,.0f}",
    )


def watched(call: Callable[[], int]) -> dict[str, float]:
    """Time and peak memory (MB) of this process over a call that answers a number."""
    base, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    tasks = call()
    return {
        "tasks": tasks,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "base": base,
        "peak": peak_mb(),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def listings(folder: str, shards: int, done: int) -> None:
    make_listings(Path(folder), shards, done)


def plan(folder: str) -> dict[str, float]:
    with listed_from(Path(folder)):
        return watched(lambda: len(make_plan(make_config(CONFIG)).tasks))


def small_files(folder: str, files: int) -> None:
    for number in range(files):
        target = Path(folder, f"{number // 1000:04}")
        target.mkdir(exist_ok=True)
        (target / f"{number:07}.jpg").write_bytes(b"x")


def list_files(folder: str) -> dict[str, float]:
    return watched(lambda: len(discover(Input(url=folder), Store())))


def receipts(count: int) -> list[tuple[str, ...]]:
    """What the driver and a committer do for every block, alone and without Ray."""
    rows = []
    for size in (128, 1024):
        blocks = [block_of(size, shard) for shard in range(256)]
        start = time.process_time()
        found = [receipt for number in range(count) for receipt in describe(blocks[number % 256], 0)]
        describing = time.process_time() - start
        progress = Progress(256)
        start = time.process_time()
        for number, receipt in enumerate(found):
            if number % 256 == 0:
                progress = Progress(256)
            progress.is_news(receipt)
            progress.on_receipt(receipt)
        counting = time.process_time() - start
        for name, seconds in (("described by a committer", describing), ("counted by the driver", counting)):
            rows.append((name, f"{size:,}", f"{seconds / len(found) * 1e6:.1f}", f"{len(found) / seconds:,.0f}"))
    return rows


def block_of(size: int, shard: int) -> pa.Table:
    """What a shard of so many samples looks like to whoever counts it."""
    rows = size + 1  # the last one says that the shard ends
    kinds = np.full(rows, Kind.SAMPLE, np.int8)
    kinds[-1] = Kind.END
    columns = {"shard": np.full(rows, shard), "kind": kinds, "index": np.arange(rows), "message": [""] * rows}
    return pa.table(columns)


def ray_tasks(count: int) -> tuple[str, ...]:
    from benchmarks.ray_tasks import follow  # Ray would count as memory of the other steps

    return follow(count)


# --- The flow --------------------------------------------------------------------------------------------------------


@app.command()
def flow(
    shards: Annotated[list[int] | None, typer.Option(help="One run for each.")] = None, per_shard: int = 100
) -> None:
    """Tiny images through the whole path with the engine that does nothing: few, many, and twice as many."""
    with scratch() as folder:
        found = {}
        for count in shards or [100, 1000, 2000]:
            write_tiny(folder / f"in-{count}", count, per_shard)
            tree = Tree()
            alone("run", folder / f"in-{count}", folder / f"out-{count}", 32, tree=tree)
            found[count] = tree
    names = sorted({name for tree in found.values() for name in tree.peaks})
    rows = []
    before = (0, 0.0)
    for count, tree in found.items():
        images = count * per_shard
        more = f"{(tree.cpu - before[1]) / (images - before[0]) * 1e3:.3f}" if before[0] else "start-up included"
        rows.append((f"{images:,}", f"{tree.cpu:.1f}", more, *(f"{tree.peaks.get(name, 0):.0f}" for name in names)))
        before = images, tree.cpu
    table(("samples", "CPU s", "CPU ms per further image", *(f"{name}, MB" for name in names)), rows)


def write_tiny(folder: Path, shards: int, per_shard: int) -> None:
    """Tars of images of 32 by 32 pixels."""
    folder.mkdir()
    images = []
    for pixels in np.random.default_rng(0).integers(0, 255, (64, 8, 8, 3), np.uint8):
        data = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32)).save(data, "JPEG")
        images.append(data.getvalue())
    for shard in range(shards):
        members = [(f"{number:06}.jpg", images[(shard + number) % 64]) for number in range(per_shard)]
        write_tar(folder / f"tiny-{shard:05}.tar", members)


def run(source: str, output: str, side: int | None) -> float:
    """A run with the engine that does nothing. Answers its images/s."""
    import ray

    model: dict[str, Any] = {"name": "resnet18", "weights": "IMAGENET1K_V1"}
    if side is not None:
        model["transform"] = {"resize": side, "crop": side}
    with on_loopback():
        ray.init("local", include_dashboard=False, log_to_driver=False)
    report = pipeline.run(
        {"input": {"url": source}, "model": model, "output": {"url": output}, "runtime": {"engine": "noop"}}
    )
    ray.shutdown()
    if report.exit_code:
        raise SystemExit(report.message)
    return report.images_per_s


# --- One large tar ---------------------------------------------------------------------------------------------------


@app.command()
def tar(photographs: Path, gigabytes: float = 5.0, quarters: int = 4) -> None:
    """One tar through the whole path: the memory of each kind of process over time."""
    with scratch() as folder:
        if shutil.disk_usage(folder).free < 2 * gigabytes * 1e9:
            raise SystemExit(f"there is no room for {gigabytes} GB in {folder}. Set TMPDIR.")
        images = write_large(folder / "large.tar", photographs, int(gigabytes * 1e9))
        tree = Tree()
        rate = alone("run", folder / "large.tar", folder / "out", None, tree=tree)
    names = sorted(tree.peaks)
    print(
        f"{gigabytes:g} GB, {images:,} images, {rate:,.0f} images/s, {tree.cpu / images * 1e3:.2f} CPU ms per image\n"
    )
    table(
        ("of the run", *(f"{name}, MB" for name in names)),
        (
            (f"{part} of {quarters}", *(f"{peaks.get(name, 0):.0f}" for name in names))
            for part, peaks in enumerate(tree.over_time(quarters), 1)
        ),
    )


def write_large(path: Path, photographs: Path, size: int) -> int:
    """A tar of this size (bytes), the photographs repeated; how many there are in it."""
    files = sorted(file for file in photographs.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"there are no JPEGs in {photographs}")
    contents = cycle([file.read_bytes() for file in files[:500]])
    written = count = 0
    with tarfile.open(path, "w") as target:
        while written < size:
            data = next(contents)
            entry = tarfile.TarInfo(f"{count:08}.jpg")
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
            written, count = written + len(data) + 1024, count + 1
    return count


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        yield Path(folder)


STEPS: dict[str, Callable[..., Any]] = {
    step.__name__: step for step in (listings, plan, small_files, list_files, receipts, ray_tasks, run)
}

if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    app()
