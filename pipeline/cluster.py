"""Where a run takes place: a Ray of its own in the process tree, a cluster by address, or the one of this job."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import ConfigError, FatalError, clean
from pipeline.urls import is_local

log = logging.getLogger(__name__)

KNOCK_S = 10.0
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


# What the servers of a Ray of our own are started with, unless the caller's environment says something of it.
LOCAL_SERVERS = (
    {"RAY_USAGE_STATS_ENABLED": "0"},
    # Half of all starts miss their own object store at the first try. Ray tries 10 times, a second apart.
    {"RAY_raylet_client_connect_timeout_milliseconds": "50", "RAY_raylet_client_num_connect_attempts": "200"},
)
# Those of a head node that a process tree has no use for: the autoscaler, and the dashboard's, which is only hidden by
# `include_dashboard=False`. The start waits for them, and the autoscaler hangs for a second at the end.
HEAD_SERVERS = ("start_monitor", "start_api_server")

# What Ray says about itself at every start; its warnings about the work are kept.
CHATTER = {
    "ray._private.authentication": logging.ERROR,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
}


@dataclass(frozen=True)
class Cluster:
    num_nodes: int
    num_cpus: int
    num_gpus: int
    is_here: bool = False  # its one node is that of this process

    def actors_at_work(self, actors: int, device: str) -> int:
        """Of so many those that have what they compute on: without a GPU of its own an actor waits."""
        return min(actors, self.num_gpus) if device == "cuda" else actors


class _Ours:
    """The connection that runs of this process have made: the last one of them ends it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0


OURS = _Ours()


def is_ray_job() -> bool:
    return IN_RAY_JOB in os.environ


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def connected(config: JobConfig) -> Iterator[Cluster]:
    """Connect, or start Ray in this process tree for `runtime.address: local`; end what was started.

    A process that is connected already, such as a notebook, keeps its connection. SIGTERM stops as Ctrl-C does
    meanwhile: ray.init installs a handler of its own, which just exits.
    """
    with terminable(), _connection(config) as cluster, terminable():
        yield cluster


@contextmanager
def _connection(config: JobConfig) -> Iterator[Cluster]:
    import ray

    for name, level in CHATTER.items():
        logging.getLogger(name).setLevel(level)
    _refuse_ray_client(config.runtime.address)
    with OURS.lock:  # another run of this process, in another thread, may be about to connect or to end
        ours = OURS.users > 0 or not ray.is_initialized()
        if not ray.is_initialized():
            _begin(config.runtime.address)
        OURS.users += ours
    try:
        cluster = describe(ray.nodes(), _this_node())
        if not cluster.is_here:
            _refuse_local_paths(config)
        yield cluster
    finally:
        with OURS.lock:
            OURS.users -= ours
            if ours and not OURS.users:
                ray.shutdown()


def _begin(address: str) -> None:
    # Ray Data needs it, and there is a core to import it while Ray's servers come up.
    threading.Thread(target=import_module, args=("pandas",), daemon=True).start()
    import ray

    try:
        with _first_interrupt_waits():
            _init(address)
    except BaseException as stop:
        ray.shutdown()  # it may have started before it was interrupted, and would pass for the caller's own
        if isinstance(stop, SystemExit):  # what ray.init's own handler makes of a SIGTERM meanwhile
            raise KeyboardInterrupt from stop
        raise


@contextmanager
def _first_interrupt_waits() -> Iterator[None]:
    """A Ctrl-C meanwhile counts at the end: inside ray.init it might be swallowed. A second one counts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _refuse_ray_client(address: str) -> None:
    from ray.util.client import ray as client

    if client.is_connected() or (address.startswith("ray://") and not is_ray_job()):
        raise ConfigError(
            "runtime.address: Ray Data does not run over Ray Client (ray://). Use `resnet-batch submit`, or run on a"
            " node of the cluster and connect with host:port or auto."
        )


def _init(address: str) -> None:
    import ray

    if is_ray_job():
        log.info("this is a Ray job: using the cluster that runs it, whatever runtime.address says")
        ray.init(logging_level=logging.WARNING)
    elif address == "local":
        try:
            with on_loopback(), _alone(), _environment(LOCAL_SERVERS):
                ray.init("local", include_dashboard=False, logging_level=logging.WARNING)
        except (OSError, ray.exceptions.AuthenticationError) as cause:
            raise FatalError(
                f"cannot start Ray: {clean(cause)}. It keeps a token in ~/.ray; where that cannot be written, set"
                " RAY_AUTH_TOKEN_PATH to a file with a long random text in it."
            ) from cause
    else:
        try:
            with nullcontext() if _is_reached(address) else on_loopback():
                ray.init(address, logging_level=logging.WARNING)
        except ValueError as cause:
            raise ConfigError(
                f"runtime.address: {address!r} is none: {clean(cause)}. Give host:port, auto or local."
            ) from cause
        except (OSError, RuntimeError, ray.exceptions.AuthenticationError) as cause:  # another version of Ray or Python
            raise FatalError(f"runtime.address: cannot connect to {address}: {clean(cause)}.") from cause


@contextmanager
def _environment(defaults: Iterable[Mapping[str, str]]) -> Iterator[None]:
    """Processes that start meanwhile have these variables; not those of which one that belongs to them is set."""
    added = [item for some in defaults if not some.keys() & os.environ.keys() for item in some.items()]
    os.environ.update(added)
    try:
        yield
    finally:
        for name, _ in added:
            del os.environ[name]


def _is_reached(address: str) -> bool:
    """Whether `host:port` is reached as Ray would do it, which replaces a loopback address by an outside one; False
    where only loopback answers. Raises OSError where nobody does: Ray would try for a quarter of an hour."""
    from ray._private.services import resolve_ip_for_localhost

    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return True
    host = host.strip("[]")
    outside = resolve_ip_for_localhost(host)
    try:
        _knock(outside, int(port))
    except OSError:
        if outside == host:
            raise
        _knock(host, int(port))
        return False
    return True


def _knock(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=KNOCK_S).close()


@contextmanager
def on_loopback() -> Iterator[None]:
    """All servers of a Ray that starts meanwhile listen on 127.0.0.1 alone.

    By itself Ray listens on every interface, and replaces a loopback `_node_ip_address` by an outside one. Only where
    it believes that there can be no cluster, as on a laptop, is loopback the address of its node.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _alone() -> Iterator[None]:
    """A Ray that starts meanwhile has no HEAD_SERVERS."""
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in HEAD_SERVERS}
    for name in HEAD_SERVERS:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def describe(nodes: Iterable[Mapping[str, Any]], here: str) -> Cluster:
    """The cluster of these nodes, as `ray.nodes` gives them; `here` is the id of this process's own."""
    alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    workers = [r for r in alive.values() if r.get("CPU") or r.get("GPU")]  # a head with CPU 0 does no work
    return Cluster(
        num_nodes=max(1, len(workers)),  # one that scales up from none has none yet
        num_cpus=max(1, int(sum(r.get("CPU", 0) for r in workers))),
        num_gpus=int(sum(r.get("GPU", 0) for r in workers)),
        is_here=list(alive) == [here],
    )


def _this_node() -> str:
    """The id of the node that this process runs on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def _refuse_local_paths(config: JobConfig) -> None:
    places = [("input.url", url, config.input_storage) for url in config.input.urls]
    places.append(("output.url", config.output.url, config.output_storage))
    for key, url, storage in places:
        if is_local(url) and not storage.shared:
            raise ConfigError(
                f"{key}: {url} is a path on one machine, and this cluster has others. Use a bucket, or set"
                " storage.shared=true if every node sees the same folder there."
            )
