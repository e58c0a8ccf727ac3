"""What is settled before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cluster import Cluster
from pipeline.config import make_config
from pipeline.model.openvino_engine import converted
from pipeline.model.predictor import PredictorSettings
from pipeline.model.spec import ModelInfo, make_spec
from pipeline.model.zoo import resolve
from pipeline.preparation import WAITING_CPUS, Job, decode_cpus
from pipeline.rows import Columns
from tests.model.helpers import output_of, python
from tests.support.jobs import digits_config

# Prints whether Ray was started, torch and Ray Data imported for that, and what was settled.
PREPARE = """
import json, sys
import ray
from pipeline.cluster import Cluster
from pipeline.config import make_config
from pipeline.preparation import prepare
from pipeline.model.openvino_engine import converted
from pipeline.model.spec import make_spec
config = make_config(json.loads(sys.argv[1]))
job = prepare(config, make_spec(config), Cluster(1, 2, 0, is_here=True), [])
imported = [name in sys.modules for name in ("torch", "ray.data")]
print(ray.is_initialized(), *imported, job.settings.engine, job.settings.batch_size, job.info.num_classes)
"""


def test_what_this_node_remembers_is_not_asked_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path / "cache"))
    config = digits_config(tmp_path, tmp_path / "labels")
    spec = make_spec(make_config(config))
    resolve(spec)
    converted(spec)
    assert output_of(python(PREPARE, json.dumps(config))) == "False False False openvino 16 10"


@pytest.mark.parametrize("shares_cores", [False, True])
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 16])
def test_the_cores_have_a_decoder_each_and_one_more_where_nothing_else_is_computed(
    cores: int, shares_cores: bool
) -> None:
    share = decode_cpus(Cluster(2, 2 * cores, 0), shares_cores)
    fit = cores + (not shares_cores)
    assert fit * share + WAITING_CPUS <= cores < (fit + 1) * share
    assert share + 10 * WAITING_CPUS <= cores, "several runs on one node would wait for each other"


@pytest.mark.parametrize(
    ("crop", "batch_size", "rows"),
    [(224, 8, 272), (224, 32, 256), (384, 32, 128), (1024, 1, 13), (1024, 8, 32), (2048, 1, 4)],
)
def test_blocks_of_large_images_hold_some_batches_and_not_gigabytes(
    crop: int, batch_size: int, rows: int, tmp_path: Path
) -> None:
    transform = {"resize": crop, "crop": crop}
    config = make_config(digits_config(tmp_path, tmp_path / "labels", model={"transform": transform}))
    spec = make_spec(config)
    settings = PredictorSettings("eager", "cpu", batch_size, Columns(1, None, 64))
    job = Job(config, spec, ModelInfo(10, None, 64), settings, 1, 0)
    assert job.rows_per_block == rows
