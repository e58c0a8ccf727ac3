"""What several tests share: one Ray for the session, images, and shards made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # the machine may have something else to do
settings.load_profile("unhurried")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TORCH_WARM_POOL", "0")  # a pool of processes for Triton's kernels, of which a CPU has none
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only; set before ray is imported


@pytest.fixture(scope="session", autouse=True)
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of converted networks and the like for this session: none that an older code has made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_BATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, shared by all tests that run a flow in this process."""
    import ray

    from pipeline.cluster import on_loopback

    with on_loopback():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
