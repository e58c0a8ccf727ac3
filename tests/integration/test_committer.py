"""Whose a commit is that stands already, as the actor that commits says it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pipeline.config import Input
from pipeline.driver import ALLOCATOR, Committer
from pipeline.inputs.shards import discover
from pipeline.outputs.commit import CommitContext
from pipeline.outputs.progress import Commit
from pipeline.planning import Task
from pipeline.storage import Store
from tests.support.jobs import digits_tars
from tests.support.pieces import BOTH, IDENTITY, new_dataset, piece


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_committer_wrote_before_it_died_is_its_own_and_not_a_rivals(tmp_path: Path) -> None:
    digits_tars(tmp_path / "shards", 1, 3)
    (shard,) = discover(Input(url=str(tmp_path / "shards")), Store())
    decision = Commit(0, 3, (ray.put(piece(BOTH, 0, range(3))),))
    context = CommitContext(new_dataset(tmp_path / "labels"), IDENTITY, BOTH, "eager")
    committer, rival = (Committer.remote(Store(), context) for _ in range(2))
    assert ray.get(rival.__ray_call__.remote(lambda _: pa.default_memory_pool().backend_name)) == ALLOCATOR
    assert ray.get(committer.commit.remote(decision, Task(shard))).is_ours
    assert not ray.get(rival.commit.remote(decision, Task(shard))).is_ours
    ray.kill(committer, no_restart=False)
    assert ray.get(committer.commit.remote(decision, Task(shard))).is_ours
