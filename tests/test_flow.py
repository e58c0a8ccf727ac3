"""What is settled before a run, and how its shards are cut into tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import Cluster, connected, describe
from pipeline.config import make_config
from pipeline.flow import PREDICT_CPUS, READ_TASK_BYTES, _chunks, decode_cpus
from pipeline.inputs.shards import Shard
from pipeline.model.spec import make_spec
from pipeline.model.zoo import resolve
from pipeline.planning import Task
from tests.model.helpers import output_of, python
from tests.support.jobs import digits_config

# Prints whether Ray was started and torch imported for that, and what was settled.
PREPARE = """
import json, sys
import ray
from pipeline.cluster import Cluster
from pipeline.config import make_config
from pipeline.flow import prepare
from pipeline.model.spec import make_spec
config = make_config(json.loads(sys.argv[1]))
job = prepare(config, make_spec(config), Cluster(1, 2, 0, is_here=True), [])
print(ray.is_initialized(), "torch" in sys.modules, job.settings.engine, job.settings.batch_size, job.info.num_classes)
"""


def test_what_this_node_remembers_is_not_asked_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "cache"))
    config = digits_config(tmp_path, tmp_path / "labels")
    resolve(make_spec(make_config(config)))
    assert output_of(python(PREPARE, json.dumps(config))) == "False False openvino 16 10"


@pytest.mark.usefixtures("ray_cluster")
def test_a_single_node_is_here_where_the_driver_runs_on_it() -> None:
    with connected(make_config(digits_config("in", "out"))) as cluster:
        assert (cluster.num_nodes, cluster.is_here) == (1, True)


def test_what_another_node_may_know_otherwise_is_asked_of_a_worker() -> None:
    mine = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}
    other, dead = mine | {"NodeID": "b"}, mine | {"NodeID": "b", "Alive": False}
    assert describe([mine], "a") == describe([mine, dead], "a") == Cluster(1, 2, 0, is_here=True)
    assert describe([mine, other], "a") == Cluster(2, 4, 0)
    assert not describe([mine | {"Resources": {}}, other], "a").is_here, "a head that does no work"
    assert not describe([mine], None).is_here, "connected from outside"


@pytest.mark.parametrize("shares_cores", [False, True])
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 16])
def test_the_cores_have_a_decoder_each_and_one_more_where_nothing_else_is_computed(
    cores: int, shares_cores: bool
) -> None:
    share = decode_cpus(Cluster(2, 2 * cores, 0), shares_cores)
    fit = cores + (not shares_cores)
    assert fit * share + PREDICT_CPUS <= cores < (fit + 1) * share
    assert share + 10 * PREDICT_CPUS <= cores, "several runs on one node would wait for each other"


@given(sizes=st.lists(st.integers(0, 200 * 2**20), min_size=1, max_size=60), cores=st.integers(1, 8))
def test_every_shard_is_in_one_task_and_the_first_tasks_are_of_one_shard(sizes: list[int], cores: int) -> None:
    tasks = [Task(Shard(f"{n}.tar", str(n), "webdataset", "", size)) for n, size in enumerate(sizes)]
    chunks = _chunks(tasks, cores)
    assert [pair for chunk in chunks for pair in chunk] == list(enumerate(tasks))
    assert all(len(chunk) == 1 for chunk in chunks[:cores])
    for chunk in chunks:
        assert len(chunk) == 1 or sum(task.shard.size for _, task in chunk) <= READ_TASK_BYTES
    assert len(chunks) <= cores + 1 + 2 * max(4 * cores, sum(sizes) / READ_TASK_BYTES + 1)
