"""How shards are cut into tasks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.flow import READ_TASK_BYTES, _chunks
from pipeline.inputs.shards import Shard
from pipeline.planning import Task


@given(sizes=st.lists(st.integers(0, 200 * 2**20), min_size=1, max_size=60), cores=st.integers(1, 8))
def test_every_shard_is_in_one_task_and_the_first_tasks_are_of_one_shard(sizes: list[int], cores: int) -> None:
    tasks = [Task(Shard(f"{n}.tar", str(n), "webdataset", "", size)) for n, size in enumerate(sizes)]
    chunks = _chunks(tasks, cores, READ_TASK_BYTES)
    assert [pair for chunk in chunks for pair in chunk] == list(enumerate(tasks))
    assert all(len(chunk) == 1 for chunk in chunks[:cores])
    for chunk in chunks:
        assert len(chunk) == 1 or sum(task.shard.size for _, task in chunk) <= READ_TASK_BYTES
    assert len(chunks) <= cores + 1 + 2 * max(4 * cores, sum(sizes) / READ_TASK_BYTES + 1)
