"""A run in local mode, from shards to the dataset: what is there, what is done again and what is not."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

import pipeline
from pipeline import driver, witness
from pipeline.config import Transform
from pipeline.deaths import Notes
from pipeline.errors import ConfigError, ExitCode, ModelMismatch, TransientError, WeightsError
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.tars import write_tar
from pipeline.preparation import Job
from pipeline.report import Counter
from tests.support.datasets import commit_all
from tests.support.jobs import BROKEN, assert_exactly_once, assert_no_leftovers, digits_config, digits_tars, rows

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and the dataset of a first run over them; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("first")
    digits_tars(folder / "shards", shards=4, per_shard=50, broken=[7])
    report = pipeline.run(digits_config(folder / "shards", folder / "labels"))
    assert report.exit_code == ExitCode.COMPLETE
    return folder


@pytest.fixture
def copy(first: Path, tmp_path: Path) -> Path:
    """`first`, put back afterwards as it was: under another path its shards would be other shards."""
    backup = tmp_path / "backup"
    shutil.copytree(first, backup, copy_function=shutil.copy2)
    yield first
    shutil.rmtree(first)
    shutil.copytree(backup, first, copy_function=shutil.copy2)


def test_a_run_that_waits_says_so(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(witness, "SILENCE_S", 0.0)
    assert pipeline.run(digits_config(first / "shards", tmp_path)).exit_code == ExitCode.COMPLETE
    (said,) = [record.message for record in caplog.records if record.message.startswith("no rows after")]
    assert "of 2 CPUs are free" in said
    assert witness.wait_for(ray.remote(num_cpus=0)(lambda: time.sleep(1.3)).remote()) is None
    assert caplog.messages[-1].startswith("no answer of a worker after")


def test_every_sample_is_a_row_or_an_error_row(first: Path):
    assert_exactly_once(first / "labels", 200)
    assert_no_leftovers(first / "labels")
    table = rows(first / "labels")
    digits = load_digits_images()
    truth = {key: str(label) for key, label in zip(digits.keys, digits.labels, strict=True)}
    right = sum(truth[row["key"]] == row["label"] for row in table.to_pylist())
    assert right >= 0.97 * table.num_rows
    assert table.num_rows == 196


def test_a_broken_image_is_an_error_row_that_says_why(first: Path):
    errors = rows(first / "labels", errors=True).to_pylist()
    assert [row["index"] for row in errors] == [7, 7, 7, 7]
    for row in errors:
        assert row["stage"] == "decode"
        assert row["error"] in {"corrupt", "not_an_image", "truncated"}
        assert row["num_bytes"] == len(BROKEN)
        assert len(row["bytes_sha256"]) == 64
        assert row["key"].startswith("digit-")


def test_a_second_run_has_nothing_to_do_and_starts_no_ray(first: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.running.connected", lambda _: pytest.fail("there is nothing to connect for"))
    before = {path: path.stat().st_mtime_ns for path in (first / "labels/data").iterdir()}
    report = pipeline.run(digits_config(first / "shards", first / "labels"))
    assert (report.exit_code, report.shards_committed, report.shards_done_before) == (0, 0, 4)
    assert {path: path.stat().st_mtime_ns for path in (first / "labels/data").iterdir()} == before


def test_only_what_is_new_or_changed_is_done(copy: Path):
    shards = copy / "shards"
    digits = load_digits_images()
    changed = [(f"other-{n}.png", encode_png(digits.images[n])) for n in range(30)]
    write_tar(shards / "digits-001.tar", changed)
    write_tar(shards / "new.tar", changed[:5])
    (shards / "digits-003.tar").unlink()
    plan = pipeline.plan(digits_config(shards, copy / "labels"))
    assert [task.shard.url.rpartition("/")[2] for task in plan.tasks] == ["digits-001.tar", "new.tar"]
    assert [url.rpartition("/")[2] for url in plan.changed] == ["digits-001.tar"]
    assert [name.rpartition("-")[0] for name in plan.gone] == ["digits-003.tar"]
    report = pipeline.run(digits_config(shards, copy / "labels"))
    assert report.shards_committed == 2
    # What is gone from the input stays in the dataset until it is pruned.
    assert_exactly_once(copy / "labels", 2 * 50 + 30 + 5 + 50)
    keys = {row["key"] for row in rows(copy / "labels").to_pylist() if row["shard"].endswith("digits-001.tar")}
    assert keys == {f"other-{n}" for n in range(30)}


def test_a_part_that_was_deleted_is_done_again(copy: Path):
    next((copy / "labels/data").iterdir()).unlink()
    report = pipeline.run(digits_config(copy / "shards", copy / "labels"))
    assert report.shards_committed == 1
    assert_exactly_once(copy / "labels", 200)


def test_another_model_is_refused_and_the_difference_is_named(first: Path):
    config = digits_config(first / "shards", first / "labels", output={"top_k": 3})
    with pytest.raises(ModelMismatch, match=r"top_k: the dataset has 5, this run 3"):
        pipeline.run(config)
    with pytest.raises(ModelMismatch, match="must not mix"):
        pipeline.plan(config)
    with pytest.raises(ModelMismatch):
        pipeline.run(digits_config(first / "shards", first / "labels", runtime={"engine": "noop"}))


def test_the_report_says_what_was_done(first: Path):
    reports = sorted((first / "labels/_runs").glob("*/report.json"))
    report = json.loads(reports[0].read_text())
    assert report["shards_committed"] == len(report["committed"]) == 4
    assert (report["predicted"], report["errors"], report["exit_code"]) == (196, 4, 0)
    assert report["config"]["runtime"]["engine"] == report["engine"] == "openvino"


def test_not_one_prediction_is_a_failure(tmp_path: Path):
    write_tar(tmp_path / "bad.tar", [(f"{n}.jpg", BROKEN) for n in range(3)])
    report = pipeline.run(digits_config(tmp_path / "bad.tar", tmp_path / "labels"))
    assert report.exit_code == ExitCode.FAILED
    assert "not one prediction" in report.message
    assert_exactly_once(tmp_path / "labels", 3)


def test_shards_with_error_rows_of_a_class_are_done_again_on_request(tmp_path: Path):
    digits = load_digits_images().images
    wide = encode_png(np.tile(digits[0], (1, 5)))  # 8 x 40, resized 32 x 160
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/wide.tar", [("a.png", encode_png(digits[0])), ("b.png", wide)])
    write_tar(tmp_path / "shards/broken.tar", [("a.png", encode_png(digits[1])), ("b.png", BROKEN)])
    commit_all(digits_config(tmp_path / "shards", tmp_path / "labels", input={"max_pixels": 2000}))
    assert "too_large" in rows(tmp_path / "labels", errors=True)["error"].to_pylist()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").rglob("broken*.*")}
    assert len(before) == 3

    config = digits_config(tmp_path / "shards", tmp_path / "labels")
    assert pipeline.run(config).shards_committed == 0, "a plain run leaves them"
    report = pipeline.run(config, retry_errors="too_large")
    assert (report.exit_code, report.shards_committed, report.shards_done_before) == (0, 1, 1)
    assert (report.predicted, report.errors) == (2, 0)
    assert len(list((tmp_path / "labels/errors").iterdir())) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").rglob("broken*.*")} == before
    assert_exactly_once(tmp_path / "labels", 4)
    assert_no_leftovers(tmp_path / "labels")
    assert pipeline.run(config, retry_errors=["too_large"]).shards_committed == 0


def test_an_empty_shard_commits_an_empty_part(tmp_path: Path):
    write_tar(tmp_path / "empty.tar", [])
    report = pipeline.run(digits_config(tmp_path / "empty.tar", tmp_path / "labels"))
    assert (report.exit_code, report.shards_committed) == (0, 1)
    assert (report.verdict, report.usage) == ("", {}), "nothing bounded what had nothing to do"
    (part,) = (tmp_path / "labels/data").iterdir()
    assert pq.read_table(part).num_rows == 0


def test_nothing_listed_is_an_error_unless_allowed(tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing to read"):
        pipeline.run(digits_config(tmp_path, tmp_path / "labels"))
    report = pipeline.run(digits_config(tmp_path, tmp_path / "labels", input={"allow_empty": True}))
    assert report.exit_code == ExitCode.COMPLETE


@pytest.fixture
def on_committed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something happen whenever the driver hears of a commit."""

    def set_action(action: Callable[[], object]) -> None:
        original = Counter.on_committed

        def patched(counter: Counter, *told: Any) -> None:
            original(counter, *told)
            action()

        monkeypatch.setattr(Counter, "on_committed", patched)

    return set_action


def test_a_run_that_fails_after_a_commit_leaves_its_report(first: Path, tmp_path: Path, on_committed):
    """As with weights that a node finds no more when its actor starts again."""
    failures = [WeightsError("they are gone")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    on_committed(fail)
    with pytest.raises(WeightsError, match="they are gone"):
        pipeline.run(digits_config(first / "shards", tmp_path / "labels"))
    (found,) = (tmp_path / "labels/_runs").glob("*/report.json")
    report = json.loads(found.read_text())
    assert (report["exit_code"], report["message"]) == (ExitCode.FAILED, "they are gone")
    assert report["shards_committed"] >= 1


def test_what_a_writer_left_that_died_meanwhile_is_swept_away(first: Path, tmp_path: Path, on_committed):
    left = tmp_path / "labels" / "data" / f".{'0' * 32}.tmp"
    on_committed(lambda: left.write_bytes(b"half"))
    pipeline.run(digits_config(first / "shards", tmp_path / "labels"))
    assert not left.exists()
    assert pipeline.verify(str(tmp_path / "labels")).ok


def test_a_truncated_tar_keeps_what_was_whole(tmp_path: Path):
    (path,) = digits_tars(tmp_path / "shards", 1, 40)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    report = pipeline.run(digits_config(path, tmp_path / "labels"))
    assert report.exit_code == ExitCode.COMPLETE
    (error,) = rows(tmp_path / "labels", errors=True).to_pylist()
    table = rows(tmp_path / "labels")
    assert 15 <= table.num_rows <= 30
    assert (error["stage"], error["error"], error["index"], error["key"]) == (
        "read",
        "truncated_shard",
        table.num_rows,
        None,
    )
    assert_exactly_once(tmp_path / "labels", table.num_rows + 1)


def test_loose_files_and_parquet_give_the_rows_of_the_tars(first: Path, tmp_path: Path):
    digits = load_digits_images()
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    images = []
    for number in range(50):
        png = BROKEN if number == 7 else encode_png(digits.images[number])
        images.append({"bytes": png, "path": digits.keys[number]})
        (folder / ("sub" if number % 2 else ".") / f"{digits.keys[number]}.png").write_bytes(png)
    pq.write_table(pa.table({"image": images, "id": list(range(50))}), tmp_path / "photos.parquet")
    (tmp_path / "urls.txt").write_text(f"# both\n{folder}\n{tmp_path}/photos.parquet\n")
    config = digits_config(tmp_path / "urls.txt", tmp_path / "labels", input={"group_size": 10})
    report = pipeline.run(config)
    assert report.shards_committed > 3
    assert_exactly_once(tmp_path / "labels", 100)
    expected = {r["key"]: r for r in rows(first / "labels").to_pylist() if r["shard"].endswith("digits-000.tar")}
    for row in rows(tmp_path / "labels").to_pylist():
        key = Path(row["key"]).stem
        assert row["score"] == expected[key]["score"]
        assert row["embedding"] == expected[key]["embedding"]


def test_images_of_their_own_sizes_are_predicted_by_size(tmp_path: Path):
    rng = np.random.default_rng(0)
    members = []
    for number in range(40):
        buffer = io.BytesIO()
        size = [(32, 32), (40, 32), (32, 48)][number % 3]
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, "PNG")
        members.append((f"{number:02}.png", buffer.getvalue()))
    write_tar(tmp_path / "mixed.tar", members)
    transform = {"resize": None, "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = digits_config(tmp_path / "mixed.tar", tmp_path / "labels", model={"transform": transform})
    alone = pipeline.predict([data for _, data in members], config)
    pipeline.run(config)
    table = rows(tmp_path / "labels")
    assert list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))[:3] == [
        (32, 32),
        (40, 32),
        (32, 48),
    ]
    assert table["class_id"].to_pylist() == alone["class_id"].to_pylist()


def test_one_tar_is_decoded_on_all_cores_and_never_in_the_actor(tmp_path: Path, first: Path):
    """With fewer shards than cores decoding is a stage of its own; in no case is it fused into the predictor."""
    from pipeline import flow
    from pipeline.cluster import Cluster
    from pipeline.config import make_config
    from pipeline.model.spec import make_spec
    from pipeline.planning import Task, make_plan
    from pipeline.preparation import prepare

    config = make_config(digits_config(first / "shards", tmp_path / "labels"))
    cluster = Cluster(num_nodes=1, num_cpus=2, num_gpus=0)
    job = prepare(config, make_spec(config), cluster, [])
    tasks: list[Task] = make_plan(config).tasks
    many = flow.pieces(tasks, job, cluster, Notes()).materialize().stats()
    one = flow.pieces(tasks[:1], job, cluster, Notes()).materialize().stats()
    for stats, stages in ((many, 2), (one, 3)):
        names = [line for line in stats.splitlines() if line.startswith("Operator ")]
        assert len(names) == stages, stats
        assert "ResNetPredictor" in names[-1]
        assert "->" not in names[-1], "decoding is fused into the predictor"


def test_large_images_of_one_tar_come_to_the_network_in_full_batches(tmp_path: Path):
    """Encoded, they travel in blocks of a few, the rest of whose batches would be padding."""
    from pipeline import flow
    from pipeline.cluster import Cluster
    from pipeline.config import make_config
    from pipeline.model.spec import make_spec
    from pipeline.planning import make_plan
    from pipeline.preparation import prepare

    noise = np.random.default_rng(0).integers(0, 256, (600, 600), np.uint8)
    write_tar(tmp_path / "large.tar", [(f"{n:02}.png", encode_png(np.roll(noise, n))) for n in range(70)])
    transform = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    sections = {"model": {"transform": transform}, "runtime": {"engine": "noop"}}
    config = make_config(digits_config(tmp_path / "large.tar", tmp_path / "labels", **sections))
    cluster = Cluster(num_nodes=1, num_cpus=2, num_gpus=0)
    job = prepare(config, make_spec(config), cluster, [])
    tasks = make_plan(config).tasks
    assert 4 * job.block_bytes < 70 * 600 * 600

    def blocks(job: Job) -> list[int]:
        pieces = flow.pieces(tasks, job, cluster, Notes()).materialize()
        assert pieces.stats().count("\nOperator ") == 2, "gathering costs a stage of its own"  # behind the first
        return [block.num_rows for block in ray.get(pieces.to_arrow_refs())]

    assert blocks(job) == [71]
    # Of images in sizes of their own no more are gathered than came together.
    own_sizes = replace(job, spec=replace(job.spec, transform=Transform(**transform | {"crop": None})))
    found = blocks(own_sizes)
    assert (len(found) > 4, sum(found)) == (True, 71)


def test_the_workers_may_stand_in_another_folder(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first / "shards", "shards")
    report = pipeline.run(digits_config("shards", "labels"))
    assert (report.exit_code, report.output_url) == (ExitCode.COMPLETE, str(tmp_path / "labels"))
    assert_exactly_once(tmp_path / "labels", 200)


def test_a_run_says_what_bounded_it_and_scores_what_was_predicted(first: Path, tmp_path: Path):
    config = digits_config(first / "shards", tmp_path / "labels")
    before = pipeline.plan(config)
    found = pipeline.plan(config, estimate=True, price_per_hour=3600)
    assert before == replace(found, estimate=None), "estimating changes nothing of the plan"
    estimate = found.estimate
    assert estimate is not None
    assert (estimate.shards, estimate.num_bytes) == (4, before.num_bytes)
    assert estimate.images == pytest.approx(200, rel=0.1)
    assert estimate.cost == pytest.approx(estimate.seconds, abs=0.06)
    assert not list((tmp_path / "labels").glob("data/*")), "nothing is committed"
    report = pipeline.run(config)
    assert report.exit_code == ExitCode.COMPLETE
    assert report.prediction["predicted_seconds"] == estimate.seconds
    assert report.prediction["seconds"] == pytest.approx(report.seconds, abs=0.1)
    assert report.verdict.startswith("start-up. ")
    spent = report.usage["spent"]
    assert 0 < spent["decode_cpu_s"] <= spent["decode_s"] * 1.1
    assert pipeline.verify(str(tmp_path / "labels")).ok


def test_a_piece_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "FETCH_S", 0.2)
    slow = ray.remote(num_cpus=0)(lambda: time.sleep(3)).remote()
    with pytest.raises(TransientError, match="did not hand out a finished piece"):
        driver._fetch(slow)
    assert driver._fetch(ray.put("piece")) == "piece"
