"""What Ray Data's driver takes for each task, in a graph that does nothing."""

from __future__ import annotations

import resource
import time
from typing import Any

import pyarrow as pa
import ray
from ray.data import read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.cluster import on_loopback


class _Nothing(Datasource):
    """Read tasks of one row each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: iter([pa.table({"row": [0]})]), unknown) for _ in range(self._count)]


def follow(count: int) -> tuple[str, ...]:
    """Tasks; seconds to the first block; CPU ms and kB of the driver for each."""
    with on_loopback():
        ray.init("local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    list(read_datasource(_Nothing(10), override_num_blocks=10).iter_internal_ref_bundles())  # starts the workers
    held, cpu, start = _peak_mb(), time.process_time(), time.perf_counter()
    bundles = read_datasource(_Nothing(count), override_num_blocks=count).iter_internal_ref_bundles()
    next(bundles)
    first = time.perf_counter() - start
    for _ in bundles:
        pass
    spent, grown = time.process_time() - cpu, _peak_mb() - held
    ray.shutdown()
    return f"{count:,}", f"{first:.1f}", f"{spent / count * 1e3:.1f}", f"{grown * 1024 / count:.1f}"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
