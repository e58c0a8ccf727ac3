"""Images that kill the process that decodes or predicts them: they become error rows, and all others are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

import pipeline
from pipeline.errors import ExitCode
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.tars import write_tar
from tests.support.jobs import assert_exactly_once, assert_no_leftovers, digits_config, rows
from tests.support.poison import KILLS_DECODER, KILLS_PREDICTOR, ROOT

PER_SHARD, DECODING, PREDICTING = 6, 1, 4


@pytest.mark.usefixtures("ray_cluster")
def test_images_that_kill_become_error_rows(tmp_path: Path) -> None:
    digits = load_digits_images()
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        images = [encode_png(digits.images[shard * PER_SHARD + place]) for place in range(PER_SHARD)]
        if shard == 1:
            images[DECODING], images[PREDICTING] = KILLS_DECODER, KILLS_PREDICTOR
        write_tar(tmp_path / f"shards/{shard}.tar", [(f"{place:02}.png", data) for place, data in enumerate(images)])
    config = digits_config(
        tmp_path / "shards", tmp_path / "labels", model={"name": "tests.support.poison:build"},
        runtime={"engine": "eager", "batch_size": 32},
    )  # fmt: skip
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.support.poison", yaml.safe_dump(config), address]
    run = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == ExitCode.COMPLETE, run.stderr[-3000:]
    found = rows(tmp_path / "labels", errors=True).to_pylist()
    assert [(row["index"], row["stage"], row["error"]) for row in found] == [
        (DECODING, "decode", "killed_worker"),
        (PREDICTING, "predict", "killed_worker"),
    ]
    assert found[0]["num_bytes"] == len(KILLS_DECODER)
    assert_exactly_once(tmp_path / "labels", 2 * PER_SHARD)
    assert_no_leftovers(tmp_path / "labels")
    assert pipeline.status(str(tmp_path / "labels")).shards == 2
