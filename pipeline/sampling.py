"""Measure on the machines that a run would use what a sample of its images takes: read, decode, network, write."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.calibration import spread
from pipeline.cluster import Cluster, connected
from pipeline.config import JobConfig
from pipeline.deaths import Guard, Notes
from pipeline.driver import MAX_COMMITS, num_committers
from pipeline.estimation import FORMAT, PREDICTION, Estimate, Measured, estimate
from pipeline.inputs.shards import Shard
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.model.predictor import ResNetPredictor
from pipeline.model.spec import ModelSpec
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.schema import Footer, part_schema, write_parquet
from pipeline.planning import Plan
from pipeline.preparation import WAITING_CPUS, Job, decode_cpus, prepare
from pipeline.rows import PIXELS, Kind, Row
from pipeline.storage import Store
from pipeline.timing import Spent
from pipeline.witness import wait_for

log = logging.getLogger(__name__)

IMAGES_PER_TASK = 150
MAX_TASKS = 16
MAX_BYTES = 256 * 2**20  # of pixels, of all tasks together, where images keep their own size; a block more of each
MEMBER_BYTES = 1024  # of a tar beside a member's content: its header, and what fills up its last block
COUNTED_BYTES = 32 * 2**20
PREDICT_SECONDS = 2.0  # at least
MIN_BATCHES = 4  # that a slow network is timed with; more than one, since some are computed at once
PROBE_BYTES = 64 * 2**20  # at most


@dataclass(frozen=True)
class Decoded:
    """What one reader made of its share of the sample."""

    images: int
    read: int  # images, of which some were not decoded
    num_bytes: float  # of shards, for these; an estimate where a shard was not read to its end
    spent: Spent
    block: pa.Table  # PIXELS


def estimate_plan(
    config: JobConfig, spec: ModelSpec, dataset: Dataset, plan: Plan, price_per_hour: float | None
) -> Estimate | None:
    """What the plan's shards will take. Left in the dataset, where the run that follows finds it. None, and a warning,
    where there is nothing to measure with."""
    measured = measure(config, spec, dataset, plan)
    if measured is None:
        log.warning(
            "there is no estimate: no image of the sample can be read and decoded, or its store tells no sizes."
            " Look at input.format and input.url"
        )
        return None
    found = estimate(measured, [task.shard.size for task in plan.tasks], price_per_hour)
    dataset.store.put(dataset.path(*PREDICTION), json.dumps(asdict(found) | {"format": FORMAT}, indent=1).encode())
    return found


def measure(config: JobConfig, spec: ModelSpec, dataset: Dataset, plan: Plan) -> Measured | None:
    """Figures of a sample of the plan's shards; None where no image of it can be read and decoded, or no shard has a
    known size, which a web server need not tell. Raises what keeps the model from being built, and what ends a worker.
    """
    begun = time.monotonic()
    shards = [task.shard for task in plan.tasks]
    with connected(config) as cluster:
        job = prepare(config, spec, cluster, shards)
        decoding, chosen = ray.remote(num_cpus=decode_cpus(cluster, job.shares_cores))(_read_and_decode), spread(shards)
        wait_for(decoding.remote(chosen[:1], job, 1, MAX_BYTES))  # what is imported and connected only once
        started = time.monotonic()
        decoded = _decode(decoding, chosen, job, cluster)
        images, read = (sum(column) for column in zip(*((d.images, d.read) for d in decoded), strict=True))
        num_bytes = sum(found.num_bytes for found in decoded)
        if not images or not num_bytes or not sum(shard.size for shard in shards):
            return None
        network_s, row_bytes, load_s = _predict([found.block for found in decoded], job)
        put_s = _put_seconds(dataset, row_bytes * _images_per_shard(shards, decoded))
        spent = sum((found.spent for found in decoded), Spent())
        return Measured(
            images=sum(found.images for found in decoded[: len(chosen)]),  # the others read the first shard again
            bytes_per_image=num_bytes / read,
            read_wait_s=spent.read_wait_s / read,
            read_cpu_s=spent.read_cpu_s / read,
            decode_cpu_s=spent.decode_cpu_s / images,
            network_s=network_s,
            row_bytes=row_bytes,
            put_s=put_s,
            start_up_s=started - begun + load_s,
            engine=job.settings.engine,
            device=job.settings.device,
            batch_size=job.settings.batch_size,
            actors=job.num_actors,
            nodes=cluster.num_nodes,
            cores=cluster.num_cpus,
            commits_at_once=MAX_COMMITS * num_committers(cluster),
            model_fingerprint=job.spec.fingerprint,
        )


def _images_per_shard(shards: Sequence[Shard], decoded: Sequence[Decoded]) -> float:
    per_byte = sum(found.read for found in decoded) / sum(found.num_bytes for found in decoded)
    return sum(shard.size for shard in shards) * per_byte / len(shards)


def _decode(decoding: Any, chosen: Sequence[Shard], job: Job, cluster: Cluster) -> list[Decoded]:
    """Read and decode on all cores at once, as a run does."""
    tasks = min(cluster.num_cpus, MAX_TASKS)
    shares = [chosen[start::tasks] or chosen[:1] for start in range(tasks)]
    answers = [decoding.remote(share, job, IMAGES_PER_TASK, MAX_BYTES // tasks) for share in shares]
    return [wait_for(answer) for answer in answers]


class _Kept(Notes):
    """Keeps what a guard tells."""

    def __init__(self) -> None:
        self.spent = Spent()

    def spend(self, spent: Spent) -> None:
        self.spent += spent


def _read_and_decode(shards: Sequence[Shard], job: Job, images: int, max_bytes: int) -> Decoded:
    """The first images of these shards, about as many of each; of the first shard more are read, to count them. None is
    decoded any more once the pixels exceed `max_bytes`."""
    notes = _Kept()
    guard, store = Guard(notes, "sample"), Store(job.config.input_storage)
    counts: list[tuple[int, float]] = []
    samples: list[pa.Table] = []

    def is_full() -> bool:
        num_bytes: int = sum(block.nbytes for block in samples)
        return num_bytes > max_bytes

    def rows() -> Iterator[Row]:
        for number, shard in enumerate(shards):
            if is_full():
                return
            found = read_rows(number, shard, job.config.input, store, guard)
            min_bytes = 0 if number else COUNTED_BYTES
            counts.append((yield from _first_images(found, shard, images / len(shards), min_bytes, is_full)))

    kinds = pa.array([Kind.SAMPLE, Kind.ENCODED], pa.uint8())
    for found in guard.watch(pixel_blocks(rows(), job.spec.transform, job.config.input, images, guard)):
        samples.append(found.filter(pc.is_in(found["kind"], kinds)))
    block = pa.concat_tables(samples) if samples else PIXELS.empty_table()
    read, num_bytes = sum(count for count, _ in counts), sum(size for _, size in counts)
    return Decoded(block.num_rows, read, num_bytes, notes.spent, block)


def _first_images(
    rows: Iterator[Row], shard: Shard, wanted: float, min_bytes: int, is_full: Callable[[], bool]
) -> Generator[Row, None, tuple[int, float]]:
    """The first images of a shard, up to as many as are wanted and while it is not full. Reads on until it has read
    `min_bytes`. Returns how many it read, and the bytes of the shard for these: an estimate where it has not come to
    the end."""
    lengths: list[int] = []
    for row in rows:
        if row.kind is Kind.END:
            return len(lengths), shard.size
        if row.kind is Kind.SAMPLE:
            lengths.append(len(row.data or b""))
            if len(lengths) <= wanted and not is_full():
                yield row
        if (len(lengths) >= wanted or is_full()) and sum(lengths) >= min_bytes:
            break
    headers = MEMBER_BYTES * len(lengths) if shard.kind == "webdataset" else 0
    return len(lengths), sum(lengths) + headers


def _predict(blocks: list[pa.Table], job: Job) -> tuple[float, float, float]:
    """Seconds per image of one device, bytes of a row in a part, and seconds to load the network."""
    predicting = ray.remote(num_cpus=WAITING_CPUS, num_gpus=job.num_gpus)(_time_predictor)
    answer: tuple[float, float, float] = wait_for(predicting.remote(blocks, job))
    return answer


def _time_predictor(blocks: list[pa.Table], job: Job) -> tuple[float, float, float]:
    begun = time.perf_counter()
    predictor = ResNetPredictor(job.spec, job.info, job.settings, decode=job.decoder)
    block, size = pa.concat_tables(blocks), job.settings.batch_size
    predictor(block.slice(0, size))  # warm
    loaded = time.perf_counter()
    predictor(block.slice(0, size))
    batches = max(round(PREDICT_SECONDS / (time.perf_counter() - loaded)), MIN_BATCHES)
    rows, filled = full_batches(min(block.num_rows, batches * size), size)
    filled = filled if job.spec.input_size is not None else 1.0  # else a batch of each size is padded, as in a run
    images, started = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - started < PREDICT_SECONDS:
        pieces = predictor(block.slice(0, rows))
        images += pieces.num_rows
    seconds = time.perf_counter() - started
    return seconds / images * filled, _row_bytes(pieces, job), loaded - begun


def full_batches(images: int, batch_size: int) -> tuple[int, float]:
    """How many of these images to time the network with, and the share of a batch that they fill if they fill none.

    What pads a batch takes as long as images do, and a run has hardly any.
    """
    return (images // batch_size * batch_size, 1.0) if images >= batch_size else (images, images / batch_size)


def _row_bytes(pieces: pa.Table, job: Job) -> float:
    """Of a part that holds these rows."""
    schema = part_schema(job.settings.columns)
    shard = pa.repeat(pa.scalar("sample"), pieces.num_rows)
    rows = pieces.set_column(pieces.schema.get_field_index("shard"), "shard", shard).select(schema.names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part")
        write_parquet(path, schema, [rows.cast(schema)], Footer("sample", "", "", "", rows.num_rows, rows.num_rows, 0))
        size: int = path.stat().st_size
    return size / int(pieces.num_rows)


def _put_seconds(dataset: Dataset, num_bytes: float) -> float:
    """To put a part of this size into the dataset's store: measured there, with a file that is deleted at once."""
    url = dataset.path("_runs", f"probe-{uuid.uuid4().hex[:8]}")
    begun = time.perf_counter()
    dataset.store.put(url, bytes(round(min(num_bytes, PROBE_BYTES))))
    seconds = time.perf_counter() - begun
    dataset.store.delete(url)
    return seconds * max(num_bytes / PROBE_BYTES, 1.0)
