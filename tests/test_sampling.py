"""What an estimate is measured with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import pipeline
from pipeline.examples.tars import write_tar
from tests.support.jobs import BROKEN, NOOP, digits_config, digits_tars


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_several_cores_decode_is_counted_once(tmp_path: Path) -> None:
    digits_tars(tmp_path / "shards", 1, 3, broken=[1])
    found = pipeline.plan(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP), estimate=True)
    assert found.estimate is not None
    assert (found.estimate.images, found.estimate.measured.images) == (3, 2)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("members", [[], [("a.jpg", BROKEN)]])
def test_without_an_image_there_is_the_plan_alone(
    members: list[tuple[str, bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", members)
    config = digits_config(tmp_path / "*.tar", tmp_path / "labels", **NOOP)
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert pipeline.plan(config, estimate=True) == pipeline.plan(config)
    assert "there is no estimate: no image of the sample can be read and decoded" in caplog.text
    assert not (tmp_path / "labels").exists()
