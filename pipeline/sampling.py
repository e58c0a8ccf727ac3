"""Measure on the machines that a run would use what a sample of its images takes: read, decode, network, write."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.calibration import spread
from pipeline.cluster import Cluster, connected
from pipeline.config import JobConfig
from pipeline.driver import MAX_COMMITS, num_committers
from pipeline.estimation import FORMAT, PREDICTION, Estimate, Measured, estimate
from pipeline.inputs.shards import Shard
from pipeline.inputs.stream import pixel_blocks, read_rows
from pipeline.model.predictor import ResNetPredictor
from pipeline.model.results import CALLS
from pipeline.model.spec import ModelSpec
from pipeline.outputs.dataset import Dataset
from pipeline.outputs.schema import Footer, part_schema, write_parquet
from pipeline.planning import Plan
from pipeline.preparation import WAITING_CPUS, Job, decode_cpus, prepare
from pipeline.rows import Kind
from pipeline.sample_reading import Counts, Decoded, read_and_decode
from pipeline.storage import Store
from pipeline.timing import Spent
from pipeline.witness import wait_for

log = logging.getLogger(__name__)

IMAGES_PER_TASK = 150
MAX_TASKS = 16
MAX_BYTES = 256 * 2**20  # of pixels, of all tasks together; a block more of each where images keep their own size
PREDICT_SECONDS = 2.0  # at least
MIN_BATCHES = 4  # that a slow network is timed with; more than one, since some are computed at once
FEW_IMAGES = 8  # at least, where they are large or have sizes of their own
PROBE_BYTES = 64 * 2**20  # at most
FLOW_S = 4.0  # that Ray Data's own actors and the committer take to come up, on two cores (docs/performance.md)


def estimate_plan(
    config: JobConfig, spec: ModelSpec, dataset: Dataset, plan: Plan, price_per_hour: float | None
) -> Estimate | None:
    """What the plan's shards will take. Left in the dataset, where the run that follows finds it. None, and a warning,
    where there is nothing to measure with."""
    measured = measure(config, spec, dataset, plan)
    if measured is None:
        log.warning(
            "there is no estimate: no image of the sample can be read, decoded and predicted, or its store tells no"
            " sizes. Look at input.format and input.url"
        )
        return None
    found = estimate(measured, [task.shard.size for task in plan.tasks], price_per_hour)
    dataset.store.put(dataset.path(*PREDICTION), json.dumps(asdict(found) | {"format": FORMAT}, indent=1).encode())
    return found


def measure(config: JobConfig, spec: ModelSpec, dataset: Dataset, plan: Plan) -> Measured | None:
    """Figures of a sample of the plan's shards; None where no image of it can be read, decoded and predicted, or no
    shard has a known size, which a web server need not tell. Raises what keeps the model from being built, and what
    ends a worker.
    """
    begun = time.monotonic()
    shards = [task.shard for task in plan.tasks]
    chosen = spread(shards)
    with connected(config) as cluster:
        connect_s = time.monotonic() - begun
        job = _settled(config, spec, cluster, shards)
        begun = time.monotonic()
        _start(config, job, cluster, chosen)
        start_up_s = connect_s + time.monotonic() - begun + FLOW_S
        decoded = _decode(chosen, job, cluster)
        counts = sum((found.counts for found in decoded), Counts())
        spent = sum((found.spent for found in decoded), Spent())
        size = sum(shard.size for shard in shards) / len(shards)
        if not (counts.decoded and counts.held and size):
            return None
        timed = wait_for(_like_an_actor(_time_predictor, job).remote([found.block for found in decoded], job))
        if timed is None:
            return None
        network_s, rows, share = timed
        readable = 1 - counts.unreadable / counts.read
        bytes_per_image, predicted = counts.num_bytes / counts.held, share * readable * counts.decoded / counts.tried
        return Measured(
            images=sum(found.counts.decoded for found in decoded[: len(chosen)]),  # others read the first shard again
            bytes_per_image=bytes_per_image,
            predicted=predicted,
            read_wait_s=spent.read_wait_s / counts.read,
            read_cpu_s=spent.read_cpu_s / counts.read,
            decode_cpu_s=spent.decode_cpu_s / counts.tried * readable,
            network_s=network_s,
            row_bytes=rows.row_bytes,
            part_bytes=rows.part_bytes,
            put_s=_put_seconds(dataset, rows.part_bytes + rows.row_bytes * predicted * size / bytes_per_image),
            start_up_s=start_up_s,
            engine=job.settings.engine,
            device=job.settings.device,
            batch_size=job.settings.batch_size,
            actors=cluster.actors_at_work(job.num_actors, job.settings.device),
            nodes=cluster.num_nodes,
            cores=cluster.num_cpus,
            commits_at_once=MAX_COMMITS * num_committers(cluster),
            model_fingerprint=job.spec.fingerprint,
        )


def _settled(config: JobConfig, spec: ModelSpec, cluster: Cluster, shards: Sequence[Shard]) -> Job:
    """The job, with all converted, tuned, calibrated and compiled that no run has to do again."""
    job = prepare(config, spec, cluster, shards)
    if job.settings.engine == "compile":
        wait_for(_like_an_actor(_load, job).remote(job))
    return job


def _like_an_actor(function: Callable[..., Any], job: Job) -> Any:
    """A task with what an actor has, in a process of its own."""
    return ray.remote(num_cpus=WAITING_CPUS, num_gpus=job.num_gpus, max_calls=1)(function)


def _start(config: JobConfig, job: Job, cluster: Cluster, chosen: Sequence[Shard]) -> None:
    """What a run does before its first block is at work. Later, all is imported and connected where it is needed."""
    import_ray_data = partial(import_module, "pipeline.flow")
    prepare(config, job.spec, cluster, chosen, meanwhile=import_ray_data)
    import_ray_data()
    decoding = ray.remote(num_cpus=decode_cpus(cluster, job.shares_cores))(_decode_one)
    starting = [decoding.remote(chosen[0], job) for _ in range(_num_readers(cluster))]
    for answer in [_like_an_actor(_load, job).remote(job), *starting]:
        wait_for(answer)


def _num_readers(cluster: Cluster) -> int:
    """Of the sample, at once."""
    return min(cluster.num_cpus, MAX_TASKS)


def _decode_one(shard: Shard, job: Job) -> None:
    rows = read_rows(0, shard, job.config.input, Store(job.config.input_storage))
    next(pixel_blocks(islice(rows, 1), job.spec.transform, job.config.input, 1))


def _decode(chosen: Sequence[Shard], job: Job, cluster: Cluster) -> list[Decoded]:
    """Read and decode on all cores at once, as a run does, or on MAX_TASKS of them."""
    readers = _num_readers(cluster)
    decoding = ray.remote(num_cpus=decode_cpus(cluster, job.shares_cores))(read_and_decode)
    shares = [chosen[start::readers] or chosen[:1] for start in range(readers)]
    most = MAX_BYTES // readers
    images = max(min(IMAGES_PER_TASK, most // job.image_bytes), FEW_IMAGES)
    answers = [decoding.remote(share, job.config, job.spec.transform, images, most) for share in shares]
    return [wait_for(answer) for answer in answers]


def _load(job: Job) -> None:
    ResNetPredictor(job.spec, job.info, job.settings, decode=job.decoder)


class _Sizes(NamedTuple):
    row_bytes: float  # of a row in a part
    part_bytes: float  # of a part besides its rows


def _time_predictor(blocks: list[pa.Table], job: Job) -> tuple[float, _Sizes, float] | None:
    """Seconds of one device for an image that it predicts, what its row takes in a part, and the share of images that
    are predicted. None where none is."""
    predictor = ResNetPredictor(job.spec, job.info, job.settings, decode=job.decoder)
    block, size, min_batches = pa.concat_tables(blocks), job.settings.batch_size, MIN_BATCHES
    if job.spec.input_size is None:  # any of them may take long: a few tell how long
        order = np.random.default_rng(0).permutation(block.num_rows)
        block, size, min_batches = block.take(order), FEW_IMAGES, 1
    predictor(block.slice(0, size))  # warm
    warm = time.perf_counter()
    predictor(block.slice(0, size))
    batches = max(round(PREDICT_SECONDS / CALLS / (time.perf_counter() - warm)), min_batches)
    rows, filled = full_batches(min(block.num_rows, batches * size), size)
    filled = filled if job.spec.input_size is not None else 1.0  # else a batch of each size is padded, as in a run
    images, predicted, started = 0, 0, time.perf_counter()
    with ThreadPoolExecutor(CALLS) as threads:  # as in a run
        while images == 0 or time.perf_counter() - started < PREDICT_SECONDS:
            for pieces in threads.map(predictor, [block.slice(0, rows)] * CALLS):
                images += pieces.num_rows
                predicted += pc.sum(pc.equal(pieces["kind"], Kind.SAMPLE)).as_py()
    seconds = time.perf_counter() - started
    if not predicted:
        return None
    rows_of_part = pieces.filter(pc.equal(pieces["kind"], Kind.SAMPLE))
    return seconds / predicted * filled, _sizes(rows_of_part, job), predicted / images


def full_batches(images: int, batch_size: int) -> tuple[int, float]:
    """How many of these images to time the network with, and the share of a batch that they fill if they fill none.

    What pads a batch takes as long as images do, and a run has hardly any.
    """
    return (images // batch_size * batch_size, 1.0) if images >= batch_size else (images, images / batch_size)


def _sizes(pieces: pa.Table, job: Job) -> _Sizes:
    """Of a part that holds these rows."""
    schema = part_schema(job.settings.columns)
    shard = pa.repeat(pa.scalar("sample"), pieces.num_rows)
    rows = pieces.set_column(pieces.schema.get_field_index("shard"), "shard", shard).select(schema.names)
    half = rows.num_rows // 2
    half_bytes, all_bytes = (_part_bytes(schema, table) for table in (rows.slice(0, half), rows))
    row_bytes = (all_bytes - half_bytes) / (rows.num_rows - half)
    return _Sizes(row_bytes, all_bytes - rows.num_rows * row_bytes)


def _part_bytes(schema: pa.Schema, rows: pa.Table) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part")
        write_parquet(path, schema, [rows.cast(schema)], Footer("sample", "", "", "", rows.num_rows, rows.num_rows, 0))
        return path.stat().st_size


def _put_seconds(dataset: Dataset, num_bytes: float) -> float:
    """To put a part of this size into the dataset's store: measured there, with a file that is deleted at once."""
    url = dataset.path("_runs", f"probe-{uuid.uuid4().hex[:8]}")
    begun = time.perf_counter()
    dataset.store.put(url, bytes(round(min(num_bytes, PROBE_BYTES))))
    seconds = time.perf_counter() - begun
    dataset.store.delete(url)
    return seconds * max(num_bytes / PROBE_BYTES, 1.0)
