"""Rows that are computed again from their source bytes, and compared with what stands in the dataset."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pipeline
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.errors import ConfigError, ModelMismatch, NotFound, SourceChanged
from pipeline.examples.tars import write_tar
from pipeline.outputs.dataset import Dataset
from pipeline.recomputing import MAX_PARTS, _pick, differences, recompute, shares
from pipeline.storage import Store
from tests.support.datasets import commit_all, names, part, rewrite, set_column, vouch
from tests.support.jobs import NETWORK, WEIGHTS, digits_config, digits_tars

PER_SHARD = 20
BROKEN_AT = 7


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a healthy dataset: three tars of digits, with one picture that cannot be read in each."""
    folder = tmp_path_factory.mktemp("healthy")
    digits_tars(folder / "shards", 3, PER_SHARD, broken=[BROKEN_AT])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config)
    return config


@pytest.fixture
def dataset(job: dict[str, Any], tmp_path: Path) -> Dataset:
    """A copy to damage."""
    shutil.copytree(job["output"]["url"], tmp_path / "labels", copy_function=shutil.copy2)
    return Dataset(str(tmp_path / "labels"), Store())


def needs_config(name: str) -> str:
    return (
        f"--sample needs --config: the network {name} is no module of yours, and what is to be executed is not taken"
        " from a dataset"
    )


def plant_label(rows: pa.Table) -> pa.Table:
    """Another class in a row, wherever the row says it."""
    row = rows.slice(3, 1).to_pylist()[0]
    wrong = (row["class_id"] + 1) % 10
    rows = set_column("class_id", 3, wrong)(set_column("label", 3, str(wrong))(rows))
    top = [row["top_k"][0] | {"class_id": wrong, "label": str(wrong)}, *row["top_k"][1:]]
    return set_column("top_k", 3, top)(rows)


def plant_score(rows: pa.Table) -> pa.Table:
    """The right class, with a score that no network gave it."""
    row = rows.slice(3, 1).to_pylist()[0]
    assert row["score"] > 0.3
    top = [
        entry | {"score": row["score"] / 100 if place else row["score"] - 0.2}
        for place, entry in enumerate(row["top_k"])
    ]
    return set_column("top_k", 3, top)(set_column("score", 3, row["score"] - 0.2)(rows))


def plant_second(rows: pa.Table) -> pa.Table:
    """The first two with nearly the same score."""
    row = rows.slice(3, 1).to_pylist()[0]
    top = [row["top_k"][0], row["top_k"][1] | {"score": row["score"] - 1e-4}, *row["top_k"][2:]]
    return set_column("top_k", 3, top)(rows)


def swap_embeddings(rows: pa.Table) -> pa.Table:
    return rows.set_column(
        rows.schema.get_field_index("embedding"),
        "embedding",
        rows["embedding"].combine_chunks().take([1, 0, *range(2, rows.num_rows)]),
    )


@pytest.mark.parametrize(
    ("change", "message", "wrong"),
    [
        (plant_label, "computed again it is ", 1),
        (plant_score, "its scores differ by up to 0.20", 1),
        (plant_second, "its scores differ by up to ", 1),
        (swap_embeddings, "the centred cosine of its embedding", 2),
        (set_column("key", 3, "elsewhere"), "its key is digit-", 1),
        (set_column("width", 3, 9), "its size is 8 x 8, stored 9 x 8", 1),
    ],
)
def test_rows_that_only_computing_again_finds_out(
    change: Callable[[pa.Table], pa.Table], message: str, wrong: int, dataset: Dataset, job: dict[str, Any]
):
    rewrite(part(dataset), change)
    vouch(dataset, names(dataset)[0])
    assert pipeline.verify(dataset.url).ok, "nothing in the dataset contradicts it"
    config = digits_config(job["input"]["url"], dataset.url)
    found = pipeline.verify(dataset.url, sample=100, config=config)
    assert (found.sampled, found.agreed) == (57, 57 - wrong)
    assert len(found.problems) == wrong
    assert all(message in problem and "digits-000.tar index" in problem for problem in found.problems)


def test_near_ties_may_be_decided_otherwise_where_one_class_is_stored(tmp_path: Path):
    state = load_file(WEIGHTS)
    even = {key: np.zeros_like(value) if key.startswith("fc.") else value for key, value in state.items()}
    save_file(even, tmp_path / "even.safetensors")
    digits_tars(tmp_path / "shards", 1, PER_SHARD)
    model, output = {"weights": str(tmp_path / "even.safetensors")}, {"top_k": 1}
    config = digits_config(tmp_path / "shards", tmp_path / "labels", model=model, output=output)
    dataset = commit_all(config)
    rewrite(part(dataset), plant_label)
    vouch(dataset, names(dataset)[0])
    found = pipeline.verify(dataset.url, sample=100, config=config)
    assert (found.sampled, found.problems) == (PER_SHARD, [])
    images = [np.zeros((8, 8), np.uint8)] * PER_SHARD
    assert {len(row["top_k"]) for row in pipeline.predict(images, config).to_pylist()} == {1}


def test_embeddings_are_compared_around_their_mean():
    """What all images have in common would hide that two of them were exchanged."""
    mean = np.full(64, 10.0)
    one, other = (mean + np.eye(64)[place] for place in (0, 1))
    assert one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) > 0.999
    row = {"key": "a", "width": 1, "height": 1, "error": None}
    stored, found = row | {"embedding": one}, row | {"embedding": other}
    assert list(differences(stored, found, mean)) == [
        "the centred cosine of its embedding with the one computed again is 0.0000"
    ]
    assert list(differences(stored, stored | {"embedding": one * 1.0001}, mean)) == []


def test_sound_shards_are_sampled_beside_damaged_ones(dataset: Dataset, job: dict[str, Any]):
    part(dataset).write_bytes(part(dataset).read_bytes()[:1000])
    found = pipeline.verify(dataset.url, sample=100, config=digits_config(job["input"]["url"], dataset.url))
    assert (found.sampled, found.agreed, len(found.problems)) == (38, 38, 1)


def test_what_changed_or_went_since_is_left_out_and_said(tmp_path: Path):
    shards = digits_tars(tmp_path / "shards", 3, 6)
    config = digits_config(tmp_path / "shards", tmp_path / "labels")
    commit_all(config)
    shards[0].unlink()
    write_tar(shards[1], [("a.png", b"other")])
    found = pipeline.verify(str(tmp_path / "labels"), sample=100, config=config)
    assert found.ok
    assert (found.sampled, found.agreed) == (6, 6)
    assert "2 of 3 shards are no longer in the input as they were committed" in str(found)
    shards[1].unlink()
    shards[2].unlink()
    found = pipeline.verify(str(tmp_path / "labels"), sample=100, config=config)
    assert (found.ok, found.sampled) == (False, 0)
    assert "3 of 3 shards are no longer" in str(found)
    assert "--sample: not one row could be recomputed. Give --config" in str(found)


def test_a_sample_opens_a_few_parts_and_not_all(tmp_path: Path):
    digits_tars(tmp_path / "shards", 6, 3)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels"))
    commit_all(config)
    opened: list[str] = []

    class Counting(Store):
        def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
            opened.append(url)
            return super().open(url, version, read_ahead)

    dataset = Dataset(config.output.url, Counting())
    footers = {name: dataset.read_footer("data", name) for name in names(dataset)}
    opened.clear()
    found = recompute(dataset, footers, 2, config)
    assert (found.sampled, found.agreed) == (2, 2)
    assert len({url for url in opened if url.endswith(".parquet")}) == 2


@pytest.mark.parametrize("gone", [NotFound("gone"), SourceChanged("replaced")])
def test_a_part_that_a_run_replaces_meanwhile_is_passed_over(dataset: Dataset, gone: Exception):
    class Beside(Store):
        def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
            if url.endswith(part(dataset).name):
                raise gone
            return super().open(url, version, read_ahead)

    rows, mean = _pick(Dataset(dataset.url, Beside()), dict.fromkeys(names(dataset), 10))
    assert {row["shard"].rpartition("/")[2] for row in rows} == {"digits-001.tar", "digits-002.tar"}
    assert mean is not None


def test_without_a_config_the_last_run_tells_it(job: dict[str, Any], dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # no OpenVINO: it takes seconds to load
    report = next(Path(dataset.url, "_runs").glob("*/report.json"))
    report.write_text(report.read_text().replace(job["output"]["url"], dataset.url))
    found = pipeline.verify(dataset.url, sample=4)
    assert (found.sampled, found.agreed) == (4, 4)
    report.write_text("{")
    with pytest.raises(ConfigError, match=r"--sample takes the config of the last run.* Give --config\."):
        pipeline.verify(dataset.url, sample=4)
    shutil.rmtree(report.parent)
    with pytest.raises(ConfigError, match=r"no report tells how they were made\. Give --config\."):
        pipeline.verify(dataset.url, sample=4)


def test_the_last_run_tells_it_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Input, output, weights and class names of a job that was started beside them; the network it does not tell."""
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    job, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    digits_tars(job / "shards", 1, 6, broken=[2])
    elsewhere.mkdir()
    monkeypatch.chdir(job)
    Path("mine_beside_the_job.py").write_text("from pipeline.examples.network import digits_resnet20 as net")
    Path("names.txt").write_text("\n".join("abcdefghij"))
    shutil.copy(WEIGHTS, "net.safetensors")
    model = {"name": "mine_beside_the_job:net", "weights": "net.safetensors", "classes": "names.txt"}
    commit_all(make_config(digits_config("shards", "labels", model=model), job))
    model["name"] = NETWORK
    commit_all(make_config(digits_config("shards", "own", model=model), job))
    monkeypatch.chdir(elsewhere)
    found = pipeline.verify("../job/own", sample=3)
    assert (found.agreed, found.note, found.problems) == (3, "", [])
    with pytest.raises(ConfigError, match=r"there is no module mine_beside_the_job.* Give --config"):
        pipeline.verify("../job/labels", sample=3)
    assert (pipeline.status("../job/labels").gone, pipeline.status("../job/labels").note) == ([], "")
    export = pipeline.dead_letters("../job/labels", export="bad").export
    assert export is not None
    assert export.files == 1
    (job / "net.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"config of the last run.*there is no file .*net.safetensors.* Give --config"
    ):
        pipeline.verify("../job/own", sample=3)


@pytest.mark.parametrize(
    "name", ["planted:net", "pipeline.api:init", "pipeline.storage:os.abort", "pipeline.examples.network:nn.Module"]
)
def test_what_is_executed_is_not_taken_from_a_dataset(
    name: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever can write to it would choose what runs here: a module in it, or any function that is installed."""
    monkeypatch.chdir(dataset.url)
    Path("planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef net(): raise SystemExit")
    report = next(Path(dataset.url, "_runs").glob("*/report.json"))
    text = json.loads(report.read_text())
    text["config"]["model"]["name"] = name
    report.write_text(json.dumps(text))
    found = pipeline.verify(dataset.url, sample=4)
    assert (found.ok, found.sampled, found.note) == (True, 0, needs_config(name))
    asked = CliRunner().invoke(app, ["verify", dataset.url, "--sample", "4"])
    assert asked.exit_code == 0
    assert "--sample needs --config" in asked.stdout
    assert not list(tmp_path.glob("ran")) + list(tmp_path.glob("config.yaml"))
    assert "planted" not in sys.modules


def test_a_custom_network_of_the_users_own_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digits_tars(tmp_path / "shards", 1, 6)
    (tmp_path / "mine_in_this_folder.py").write_text("from pipeline.examples.network import digits_resnet20 as net")
    monkeypatch.chdir(tmp_path)
    commit_all(make_config(digits_config("shards", "labels", model={"name": "mine_in_this_folder:net"})))
    found = pipeline.verify("labels", sample=3)
    assert (found.agreed, found.note, found.problems) == (3, "", [])


def test_a_custom_network_is_recomputed_with_the_users_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    digits_tars(tmp_path / "shards", 1, 6)
    (tmp_path / "mine_beside_the_config.py").write_text("from pipeline.examples.network import digits_resnet20 as net")
    model = {"name": "mine_beside_the_config:net"}
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", model=model), tmp_path)
    commit_all(config)
    found = pipeline.verify(tmp_path / "labels", sample=3, config=config)
    assert (found.agreed, found.note, found.problems) == (3, "", [])


def test_a_config_of_another_model_cannot_verify(job: dict[str, Any], dataset: Dataset):
    config = digits_config(job["input"]["url"], dataset.url, output={"top_k": 2})
    with pytest.raises(ModelMismatch, match="top_k: the dataset has 5, this run 2"):
        pipeline.verify(dataset.url, sample=4, config=config)


@given(st.dictionaries(st.text(), st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300))
def test_as_many_rows_are_drawn_as_were_asked_for_or_all_there_are(counts: dict[str, int], sample: int):
    found = shares(counts, sample)
    assert sum(found.values()) == min(sample, sum(counts.values()))
    assert all(0 < share <= counts[name] for name, share in found.items())
    enough = min(counts.values()) * MAX_PARTS
    assert len(found) <= (MAX_PARTS if enough >= sample else len(counts))
    spare = [share for name, share in found.items() if share < counts[name]]
    assert not spare or max(found.values()) <= min(spare) + 1, "as even as they allow"
