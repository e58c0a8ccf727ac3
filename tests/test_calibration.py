"""int8 datasets: one network for all their rows, made once of the job's images, known by what `_dataset.json` says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pipeline
from pipeline.calibration import NUM_SHARDS, _images, calibrate, known_spec, spread
from pipeline.config import JobConfig, make_config
from pipeline.deaths import LONE_DEATHS
from pipeline.errors import ConfigError, FatalError, ModelMismatch, StoreUnavailable
from pipeline.inputs import stream
from pipeline.inputs.images import decode
from pipeline.inputs.shards import Shard, discover
from pipeline.model.spec import make_spec
from pipeline.preparation import CALIBRATION_RETRIES, _settle
from pipeline.storage import Store
from tests.support.jobs import WEIGHTS, assert_exactly_once, assert_no_leftovers, digits_config, digits_tars, rows
from tests.test_deaths import Died, Machine

INT8 = {"precision": "int8"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return digits_tars(tmp_path_factory.mktemp("input"), 3, 40, broken=[3])


def job(shards: Path, output: Path, engine: str = "auto", **model: str) -> JobConfig:
    return make_config(digits_config(shards, output, model=INT8 | model, runtime={"engine": engine}))


def listed(config: JobConfig) -> list[Shard]:
    return discover(config.input, Store(config.input_storage))


# A run of two shards, and what is asked of its dataset.


@pytest.fixture(scope="module")
def dataset(shards: list[Path], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> JobConfig:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "input").mkdir()
    for path in shards[:2]:
        shutil.copy2(path, folder / "input")
    config = job(folder / "input" / "*.tar", folder / "labels")
    assert pipeline.run(config).exit_code == 0
    return config


def network_of(config: JobConfig) -> Path:
    (path,) = (Path(config.output.url) / "_model").iterdir()
    return path


def test_the_network_is_part_of_the_dataset_and_of_its_identity(dataset: JobConfig):
    sha256 = hashlib.sha256(network_of(dataset).read_bytes()).hexdigest()
    identity = json.loads((Path(dataset.output.url) / "_dataset.json").read_text())
    assert identity["model"]["calibration"] == f"sha256:{sha256}"
    assert identity["model_fingerprint"] == known_spec(dataset).fingerprint != make_spec(dataset).fingerprint
    (run,) = (Path(dataset.output.url) / "_runs").glob("*/report.json")
    assert json.loads(run.read_text())["model_fingerprint"] == identity["model_fingerprint"]
    assert_exactly_once(dataset.output.url, 80)
    assert_no_leftovers(Path(dataset.output.url))


def test_its_rows_are_those_of_fp32_nearly(dataset: JobConfig):
    found = rows(dataset.output.url)
    exact = pipeline.preview(
        dataset.model_copy(update={"model": dataset.model.model_copy(update={"precision": "float32"})}), 80
    )
    exact = exact.filter(exact["error"].is_null()).sort_by([("shard", "ascending"), ("index", "ascending")])
    assert found["key"].to_pylist() == exact["key"].to_pylist()
    assert np.mean([a == b for a, b in zip(found["class_id"], exact["class_id"], strict=True)]) >= 0.97
    assert found["embedding"].to_pylist() != exact["embedding"].to_pylist()


def test_rows_are_computed_again_with_its_network(dataset: JobConfig):
    found = pipeline.verify(dataset.output.url, sample=20)
    assert found.ok, str(found)
    previewed = pipeline.preview(dataset, 10)
    stored = {row["key"]: row["embedding"] for row in rows(dataset.output.url).to_pylist()}
    predicted = [row for row in previewed.to_pylist() if row["error"] is None]
    assert len(predicted) == 9
    for row in predicted:
        np.testing.assert_allclose(row["embedding"], stored[row["key"]], atol=2e-3)


@pytest.mark.parametrize(("section", "key", "value"), [("model", "precision", "float32"), ("output", "top_k", 3)])
def test_another_model_is_refused(dataset: JobConfig, section: str, key: str, value: str | int):
    data = dataset.model_dump()
    data[section][key] = value
    with pytest.raises(ModelMismatch, match=f"{key}: the dataset has .*, this run {value}|this run .{value}"):
        pipeline.plan(make_config(data))


def test_another_network_than_its_own_is_named(dataset: JobConfig, tmp_path: Path):
    shutil.copytree(dataset.output.url, tmp_path / "labels")
    copy = tmp_path / "labels" / "_model" / network_of(dataset).name
    with copy.open("ab") as file:
        file.write(b"more")
    (problem,) = pipeline.verify(str(tmp_path / "labels")).problems
    assert re.search(r"_model/\w+\.zip is not the int8 network that it was made with: its sha256 is", problem)
    copy.unlink()
    (problem,) = pipeline.verify(str(tmp_path / "labels")).problems
    assert "the int8 network that it was made with is missing" in problem


def test_a_later_run_goes_on_with_its_network(dataset: JobConfig, shards: list[Path]):
    before = network_of(dataset), network_of(dataset).stat().st_mtime_ns
    shutil.copy2(shards[2], Path(dataset.input.url).parent)
    report = pipeline.run(dataset)
    assert (report.shards_committed, report.exit_code) == (1, 0)
    assert (network_of(dataset), network_of(dataset).stat().st_mtime_ns) == before
    assert_exactly_once(dataset.output.url, 120)


# Making it.


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return digits_tars(tmp_path / "input", 2, 6)[0].parent / "*.tar"


def test_of_two_first_runs_both_go_on_with_one_network(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = job(small, tmp_path / "labels")
    first, second = listed(config)
    before = known_spec(config)
    winner, loser = (calibrate(before, config, [shard]) for shard in (first, second))
    assert winner == loser == known_spec(config)
    assert not winner.needs_calibration
    assert "int8 is calibrated on 6 images only" in caplog.text
    elsewhere = calibrate(before, job(small, tmp_path / "others"), [second])
    assert elsewhere.fingerprint != winner.fingerprint  # other images make another model


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """The digits' weights without their head."""
    state = {key: value for key, value in load_file(WEIGHTS).items() if not key.startswith("fc.")}
    save_file(state, tmp_path / "backbone.safetensors")
    return str(tmp_path / "backbone.safetensors")


def test_a_model_that_is_refused_is_not_calibrated_first(small: Path, tmp_path: Path, backbone: str):
    config = job(small, tmp_path / "labels", weights=backbone)
    with pytest.raises(ConfigError, match="output.predictions: the weights are those of a backbone"):
        _settle(known_spec(config), config, False, listed(config), None)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("has_head", [True, False])
def test_classes_are_compared_where_the_weights_tell_them(
    small: Path, tmp_path: Path, backbone: str, has_head: bool, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr("pipeline.calibration.agreement", lambda *_: 0.1)
    config = job(small, tmp_path / "labels", **({} if has_head else {"weights": backbone}))
    output = config.output.model_copy(update={"predictions": False})
    config = config.model_copy(update={"output": output})
    calibrated, _, _ = _settle(known_spec(config), config, False, listed(config), None)
    assert calibrated.quantised is not None
    assert ("int8 gives only 10 % of the calibration images" in caplog.text) == has_head


def test_shards_are_taken_from_all_over_the_plan(small: Path, tmp_path: Path):
    few = listed(job(small, tmp_path / "labels"))
    assert spread(few) == few
    assert spread([]) == []
    many = [few[0]] * 999 + [few[1]]
    assert len(spread(many)) == NUM_SHARDS
    assert [spread(list(range(1000)))[place] for place in (0, 1, 31)] == [0, 31, 968]  # type: ignore[type-var]


def test_an_image_that_kills_its_process_is_left_out(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, machine = job(small, tmp_path / "labels"), Machine()
    planned, spec = listed(config), make_spec(config)
    whole = _images(planned, spec, config, machine)
    seen: list[bytes] = []

    def deadly(data: bytes, *args: Any) -> Any:
        seen.append(data)
        if len(seen) > 3 and data == seen[3]:  # the fourth of the first shard
            machine.die()
            raise Died
        return decode(data, *args)

    monkeypatch.setattr(stream, "decode", deadly)
    for _ in range(CALIBRATION_RETRIES + 1):
        with contextlib.suppress(Died):
            found = _images(planned, spec, config, machine)
            break
    assert len(machine.dead) <= 2 + LONE_DEATHS
    assert [image.tobytes() for image in found] == [image.tobytes() for image in whole[:3] + whole[4:]]


def test_an_input_without_an_image_is_refused(tmp_path: Path):
    digits_tars(tmp_path / "input", 1, 3, broken=[0, 1, 2])
    config = job(tmp_path / "input" / "*.tar", tmp_path / "labels")
    with pytest.raises(FatalError, match=r"not one of the first of 1 shards can be decoded, .*digits-000.tar"):
        calibrate(known_spec(config), config, listed(config))


def test_an_input_that_cannot_be_read_is_tried_again(tmp_path: Path, small: Path):
    config = job(small, tmp_path / "labels")
    planned = listed(config)
    for path in small.parent.iterdir():
        path.unlink()
    with pytest.raises(StoreUnavailable, match=r"no image could be read to calibrate int8 on.*Run again"):
        calibrate(known_spec(config), config, planned)


def test_without_nncf_it_names_the_remedy(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    config = job(small, tmp_path / "labels")
    with pytest.raises(ConfigError, match="nncf, which is not installed .* pip install 'nncf>=3,<4'"):
        calibrate(known_spec(config), config, listed(config))


def test_without_a_dataset_nothing_can_be_predicted(tmp_path: Path, small: Path):
    with pytest.raises(ConfigError, match=r"int8 needs a network that is calibrated .* Do the run first"):
        pipeline.preview(job(small, tmp_path / "labels"), 1)
    with pytest.raises(ConfigError, match=r"here runtime.engine is eager on cpu"):
        pipeline.preview(job(small, tmp_path / "labels", engine="eager"), 1)
