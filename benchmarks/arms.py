"""The arms of `compare`, and one run of an arm in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as ds

from benchmarks.measuring import watch
from benchmarks.networks import CORES
from benchmarks.summary import Outcome, steady_rate

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    # Sleeping threads, which `resnet-batch` asks torch for: decoding has the same cores. Every eager arm gains by it.
    "OMP_WAIT_POLICY": "passive",
    # Nobody waits for a server that gathers statistics.
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "true",
    "DAFT_PROGRESS_BAR": "0",
}


@dataclass(frozen=True)
class Arm:
    title: str
    kind: str  # ours, as it comes, our network
    module: str  # in benchmarks.peers
    options: tuple[str, ...] = ()
    parquet: bool = False  # else tars
    needs: str | None = None  # a package


ALL_CORES = ("--threads", str(CORES))
SMALL_BATCHES = ("--batch-size", "8")  # the fastest for torch on CPUs: what a batch needs stays in the caches
OPENVINO = ("--network", "openvino")
ARMS = {
    "ours": Arm("resnet-batch run", "ours", "ours"),
    "ray": Arm("Ray, documented", "as it comes", "ray_documented"),
    "ray-all-cores": Arm(
        "Ray, documented, network on all cores", "as it comes", "ray_documented", ALL_CORES + SMALL_BATCHES
    ),
    "ray-tuned": Arm("Ray, its own benchmark's way", "as it comes", "ray_tuned", ALL_CORES, parquet=True),
    "daft": Arm("Daft", "as it comes", "daft_class", SMALL_BATCHES, parquet=True, needs="daft"),
    "webdataset": Arm("webdataset + DataLoader", "as it comes", "webdataset_loader", SMALL_BATCHES, needs="webdataset"),
    "daft-openvino": Arm("Daft, our network", "our network", "daft_class", OPENVINO, parquet=True, needs="daft"),
    "webdataset-openvino": Arm(
        "webdataset + DataLoader, our network",
        "our network",
        "webdataset_loader",
        OPENVINO,
        needs="webdataset",
    ),
}


def is_installed(name: str) -> bool:
    package = ARMS[name].needs
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"{name} is left out: {package} is not installed (pip install '.[bench]')")
    return False


@dataclass(frozen=True)
class Setting:
    """What all arms get: a folder with `tars`, `parquet` and `cache`, and a model."""

    work: Path
    model: str

    @property
    def weights(self) -> Path:
        return self.work / f"{self.model}.pth"

    @property
    def cache(self) -> Path:
        return self.work / "cache"


@dataclass(frozen=True)
class Done:
    outcome: Outcome
    classes: dict[str, int]  # by key
    peak_mb: float | None


def run_arm(arm: Arm, setting: Setting, memory: bool = False, tars: str = "tars") -> Done:
    """One run from start to exit. Raises SystemExit where it fails or gives a row twice."""
    output = setting.work / "output"
    command = _command(arm, setting, output, tars)
    watched = watch(command, _environment(setting), setting.work / "log", memory)
    done = [json.loads(row) for row in (output / "times").read_text().splitlines()]
    # resnet-batch leaves a dataset, the others plain files.
    data = output / "rows" / "data" if arm.kind == "ours" else output / "rows"
    rows = ds.dataset(data, format="parquet").to_table(["key", "class_id"])
    classes = dict(zip(rows["key"].to_pylist(), rows["class_id"].to_pylist(), strict=True))
    if len(classes) != rows.num_rows:
        raise SystemExit(f"{arm.title}: {rows.num_rows} rows, but {len(classes)} keys")
    parts = [path.stat().st_mtime for path in data.glob("*.parquet")] if arm.kind == "ours" else []
    outcome = Outcome(
        images=rows.num_rows,
        seconds=watched.seconds,
        steady=steady_rate(done),
        first_batch=min(at for at, _ in done) - watched.started,
        first_part=min(parts) - watched.started if parts else None,
    )
    return Done(outcome, classes, watched.peak_mb)


def run_limit(setting: Setting) -> dict[str, float]:
    """Images/s: `decoding` alone, and the network alone, `network_in_turn` and `network_streams`."""
    output = setting.work / "output"
    command = _command(Arm("limit", "limit", "limit"), setting, output, "tars")
    watch(command, _environment(setting), setting.work / "log", memory=False)
    return dict(json.loads((output / "limit").read_text()))


def run_ray_init(setting: Setting) -> float:
    """Seconds that `ray.init` takes, which is the unit for start-up."""
    code = (
        "import sys, time\nfrom pathlib import Path\nimport ray\nfrom pipeline.cluster import on_loopback\n"
        "start = time.time()\nwith on_loopback():\n    ray.init(include_dashboard=False)\n"
        "Path(sys.argv[1]).write_text(str(time.time() - start))\nray.shutdown()\n"
    )
    answer = setting.work / "ray-init"
    watch([sys.executable, "-c", code, str(answer)], _environment(setting), setting.work / "log", memory=False)
    return float(answer.read_text())


def _command(arm: Arm, setting: Setting, output: Path, tars: str) -> list[str]:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    folder = setting.work / ("parquet" if arm.parquet else tars)
    paths = [str(path) for path in (folder, setting.weights, output)]
    return [sys.executable, "-m", f"benchmarks.peers.{arm.module}", *paths, "--model", setting.model, *arm.options]


def _environment(setting: Setting) -> dict[str, str]:
    return ENVIRONMENT | {"RESNET_BATCH_CACHE": str(setting.cache)}
