"""How shards are cut into tasks, and what comes to the predictor at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.flow import READ_TASK_BYTES, _chunks, _rows_at_once
from pipeline.inputs.shards import Shard
from pipeline.planning import Task
from tests.test_sampling import job_of


@given(sizes=st.lists(st.integers(0, 200 * 2**20), min_size=1, max_size=60), cores=st.integers(1, 8))
def test_every_shard_is_in_one_task_and_the_first_tasks_are_of_one_shard(sizes: list[int], cores: int) -> None:
    tasks = [Task(Shard(f"{n}.tar", str(n), "webdataset", "", size)) for n, size in enumerate(sizes)]
    chunks = _chunks(tasks, cores, READ_TASK_BYTES)
    assert [pair for chunk in chunks for pair in chunk] == list(enumerate(tasks))
    assert all(len(chunk) == 1 for chunk in chunks[:cores])
    for chunk in chunks:
        assert len(chunk) == 1 or sum(task.shard.size for _, task in chunk) <= READ_TASK_BYTES
    assert len(chunks) <= cores + 1 + 2 * max(4 * cores, sum(sizes) / READ_TASK_BYTES + 1)


@pytest.mark.parametrize(
    ("crop", "decode", "device", "has_few_shards", "rows"),
    [
        (224, "fast", "cpu", False, None),
        (224, "fast", "cpu", True, 256),
        (224, "fast", "cuda", False, 256),
        (224, "nvjpeg", "cuda", False, 64),  # of any size in bytes, so no more than need be
        (None, "fast", "cuda", True, None),
    ],
)
def test_the_predictor_gets_full_batches_where_blocks_may_hold_less(
    crop: int | None, decode: str, device: str, has_few_shards: bool, rows: int | None, tmp_path: Path
) -> None:
    """Encoded photographs of a camera come a few in a block."""
    transform = {"resize": 256, "crop": crop, "decode": decode}
    job = job_of(tmp_path, model={"name": "resnet18", "weights": "random", "transform": transform})
    settings = replace(job.settings, device=device, batch_size=64)
    job = replace(job, settings=settings, num_gpus=1 if device == "cuda" else 0)
    assert _rows_at_once(job, has_few_shards) == rows
