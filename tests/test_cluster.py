"""Where a run takes place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ray.exceptions import AuthenticationError

from pipeline import cluster
from pipeline.cluster import Cluster, _environment, connected, describe
from pipeline.config import make_config
from pipeline.errors import ConfigError, FatalError
from tests.support.jobs import digits_config


@pytest.mark.usefixtures("ray_cluster")
def test_a_single_node_is_here_where_the_driver_runs_on_it() -> None:
    with connected(make_config(digits_config("in", "out"))) as cluster:
        assert (cluster.num_nodes, cluster.is_here) == (1, True)


def test_sigterm_stops_as_ctrl_c_does_whatever_handler_ray_has() -> None:
    """In a process of its own: a signal to that of the tests, with all that is loaded there, has crashed it."""
    code = """
import signal
import ray
from pipeline import cluster
from pipeline.config import make_config

def start(address):
    signal.signal(signal.SIGTERM, lambda *_: print("Ray's handler"))

ray.nodes, ray.shutdown = list, lambda: print("ended")
cluster._init, cluster._this_node = start, lambda: None
before = signal.getsignal(signal.SIGTERM)
try:
    with cluster.connected(make_config({"input": {"url": "s3://in"}, "output": {"url": "s3://out"}})):
        signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    print("stopped", signal.getsignal(signal.SIGTERM) is before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n") == ["ended", "stopped True", ""], done.stderr


def test_a_ray_that_was_interrupted_as_it_started_is_not_left_behind() -> None:
    """The next run of a notebook would take it for the notebook's own. In a process of its own, for the signal."""
    code = """
import signal
import ray
from pipeline import cluster
from pipeline.config import make_config

started = []
ray.is_initialized, ray.shutdown = lambda: bool(started), started.clear

def start(address):
    started.append(address)
    signal.raise_signal(signal.SIGINT)

cluster._init = start
try:
    with cluster.connected(make_config({"input": {"url": "s3://in"}, "output": {"url": "s3://out"}})):
        print("connected")
except KeyboardInterrupt:
    print("stopped", started, cluster.OURS.users)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "stopped [] 0\n", done.stderr


def test_ray_client_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = digits_config("s3://in", "s3://out")
    outside = make_config(config | {"runtime": {"address": "ray://head:10001"}})
    with pytest.raises(ConfigError, match=r"does not run over Ray Client .*resnet-batch submit"), connected(outside):
        pass
    monkeypatch.setattr("ray.util.client.ray.is_connected", lambda: True)
    with pytest.raises(ConfigError, match="does not run over Ray Client"), connected(make_config(config)):
        pass


def test_another_version_of_ray_or_python_than_the_clusters_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object, **__: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Python: 3.11.9")

    monkeypatch.setattr("ray.init", differs)
    with pytest.raises(FatalError, match=r"^runtime.address: cannot connect to auto: Version mismatch.*Python: 3.11.9"):
        cluster._init("auto")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "/nohome"), AuthenticationError("No such file")]
)
def test_where_ray_cannot_keep_its_token_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(FatalError, match=r"cannot start Ray: .*No such file.* set RAY_AUTH_TOKEN_PATH to a file"):
        cluster._init("local")


def test_what_another_node_may_know_otherwise_is_asked_of_a_worker() -> None:
    mine = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}
    other, dead = mine | {"NodeID": "b"}, mine | {"NodeID": "b", "Alive": False}
    assert describe([mine], "a") == describe([mine, dead], "a") == Cluster(1, 2, 0, is_here=True)
    assert describe([mine, other], "a") == Cluster(2, 4, 0)
    assert not describe([mine | {"Resources": {}}, other], "a").is_here, "a head that does no work"


def test_an_actor_without_a_gpu_is_not_at_work() -> None:
    cluster = Cluster(2, 16, 2)
    assert [cluster.actors_at_work(8, device) for device in ("cuda", "cpu")] == [2, 8]
    assert cluster.actors_at_work(1, "cuda") == 1


def test_what_our_servers_are_started_with_stays_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "by the caller")
    monkeypatch.delenv("NEW", raising=False)
    monkeypatch.delenv("BESIDE", raising=False)
    with _environment([{"SET": "by us", "BESIDE": "by us"}, {"NEW": "by us"}]):
        assert (os.environ["SET"], os.environ["NEW"]) == ("by the caller", "by us")
        assert "BESIDE" not in os.environ
    assert os.environ["SET"] == "by the caller"
    assert "NEW" not in os.environ


@pytest.mark.parametrize("address", ["head", "Local"])
def test_an_address_that_is_none_is_a_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"runtime.address: '{address}' is none: .* Give host:port"):
        cluster._init(address)


def test_a_path_of_this_machine_is_nothing_to_a_worker_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a head that has no CPUs and one worker."""
    worker = {"NodeID": "b", "Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr("ray.nodes", lambda: [worker])
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "_this_node", lambda: "a")
    with pytest.raises(ConfigError, match="is a path on one machine"), connected(make_config(digits_config("a", "b"))):
        pass
    with connected(make_config(digits_config("a", "b", storage={"shared": True}))) as found:
        assert found.num_nodes == 1
