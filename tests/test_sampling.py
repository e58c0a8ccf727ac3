"""What an estimate is measured with."""

from __future__ import annotations

import gzip
import io
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline
from pipeline import sample_reading, sampling
from pipeline.config import make_config
from pipeline.errors import Stopped
from pipeline.examples.tars import tar_bytes, write_tar
from pipeline.inputs import stream
from pipeline.model.predictor import PredictorSettings, ResNetPredictor
from pipeline.model.spec import result_columns
from pipeline.model.zoo import resolve
from pipeline.planning import Plan, make_plan, model_and_dataset
from pipeline.preparation import Job, prepare
from pipeline.rows import Kind
from pipeline.sample_reading import Counts, read_and_decode
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
    assert "there is no estimate: no image of the sample can be read, decoded and predicted" in caplog.text
    assert not (tmp_path / "labels").exists()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("sizes", "sampled"), [((0, 0, 0), 3), ((0, 1000, 1000), 1)])
def test_without_sizes_there_is_the_plan_alone(
    sizes: tuple[int, ...], sampled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a web server that sends no Content-Length. Of three shards, the third is not read to its end."""
    digits_tars(tmp_path / "shards", 3, 80)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))
    tasks = make_plan(config).tasks
    plan = Plan([replace(task, shard=replace(task.shard, size=n)) for task, n in zip(tasks, sizes, strict=True)])
    monkeypatch.setattr(sampling, "spread", lambda shards: shards[:sampled])
    assert sampling.estimate_plan(config, *model_and_dataset(config), plan, None) is None


def _dies(*_: Any) -> None:
    os._exit(1)


def _fails(*_: Any) -> None:
    raise ValueError("too odd")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("step", "what_it_does", "sentence"),
    [
        ("read_and_decode", _dies, "a worker died. Often that is for want of memory"),
        ("_time_predictor", _fails, "a worker failed with ValueError: too odd. --debug shows where"),
    ],
)
def test_a_worker_that_fails_is_a_sentence(
    step: str, what_it_does: Callable[..., None], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits_tars(tmp_path / "shards", 1, 3)
    monkeypatch.setattr(sampling, step, what_it_does)
    with pytest.raises(Stopped, match=sentence):
        pipeline.plan(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP), estimate=True)


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_done_once_for_all_runs_is_not_charged_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As converting, tuning and calibrating are."""
    digits_tars(tmp_path / "shards", 1, 3)
    config, first = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP)), [5.0]

    def slow_at_first(*given: Any, **named: Any) -> Job:
        time.sleep(first.pop() if first else 0.0)
        return prepare(*given, **named)

    monkeypatch.setattr(sampling, "prepare", slow_at_first)
    found = sampling.measure(config, *model_and_dataset(config), make_plan(config))
    assert found is not None
    assert not first
    assert found.start_up_s < sampling.FLOW_S + 5


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_compiled_is_timed_when_it_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as an actor is. A network that is not compiled is loaded once for that."""
    digits_tars(tmp_path / "shards", 1, 3)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))

    def settle(*given: Any, **named: Any) -> Job:
        job = prepare(*given, **named)
        return replace(job, settings=replace(job.settings, engine=engine))

    def load(job: Job) -> None:
        with (tmp_path / f"{job.settings.engine}").open("a") as file:
            print(os.getpid(), file=file)
        time.sleep(4.0 if len((tmp_path / "compile").read_text().split()) == 1 else 0.0)

    monkeypatch.setattr(sampling, "prepare", settle)
    monkeypatch.setattr(sampling, "_load", load)
    monkeypatch.setattr(sampling, "_time_predictor", lambda *_: (0.001, sampling._Sizes(10.0, 0.0), 1.0))
    for engine, loads in (("compile", 2), ("eager", 1)):
        found = sampling.measure(config, *model_and_dataset(config), make_plan(config))
        assert found is not None
        assert found.start_up_s < sampling.FLOW_S + 4
        assert len(set((tmp_path / engine).read_text().split())) == loads


def job_of(folder: Path, **sections: Any) -> Job:
    config = make_config(digits_config(folder, folder / "labels", **NOOP | sections))
    spec, _ = model_and_dataset(config)
    info = resolve(spec)
    settings = PredictorSettings("noop", "cpu", 8, result_columns(config.output, info))
    return Job(config, spec, info, settings, 1, 0)


def png(noise: random.Random, side: int = 82) -> bytes:
    """Some 20 kB."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise.randbytes(side * side * 3)).save(file, "PNG")
    return file.getvalue()


def test_images_of_their_own_size_are_taken_until_they_fill_the_share_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block holds one image here. Of all shards those are still counted that they hold."""
    digits_tars(tmp_path, 2, 10, scale=4)
    transform = {"resize": None, "crop": None}
    job = job_of(tmp_path, model={"name": "resnet18", "weights": "random", "transform": transform})
    monkeypatch.setattr(stream, "MAX_BLOCK_BYTES", 1)
    shards = [task.shard for task in make_plan(job.config).tasks]
    pixels = 32 * 32 * 3
    unbounded = read_and_decode(shards, job.config, job.spec.transform, 20, 100 * pixels)
    found = read_and_decode(shards, job.config, job.spec.transform, 20, 3 * pixels)
    size = shards[0].size + shards[1].size
    assert unbounded.counts == Counts(read=20, tried=20, decoded=20, held=20, num_bytes=size)
    assert found.counts == Counts(read=20, tried=3, decoded=3, held=20, num_bytes=size)
    assert found.block.num_rows == 3


def counts_of(folder: Path, images: int, **sections: Any) -> Counts:
    job = job_of(folder, **sections)
    shards = [task.shard for task in make_plan(job.config).tasks]
    return read_and_decode(shards, job.config, job.spec.transform, images, 10**9).counts


def test_of_every_shard_at_least_one_image_is_decoded(tmp_path: Path) -> None:
    """As where images are large, and few are taken of many shards."""
    digits_tars(tmp_path, 4, 5)
    found = counts_of(tmp_path, 2)
    assert (found.tried, found.held) == (4, 20)


@pytest.mark.parametrize("kilobytes", [60, 400, 900, 1500])
def test_a_tar_of_large_images_is_counted_about_right(
    kilobytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose reader stops anywhere in what it has read ahead."""
    monkeypatch.setattr(sample_reading, "COUNTED_BYTES", 0)
    noise = random.Random(0)
    image = png(noise)
    found: list[float] = []
    for number in range(4):  # in padding that Pillow does not look at, and the images begin elsewhere
        folder = tmp_path / str(number)
        folder.mkdir()
        members = [(f"{n}.png", image + bytes(kilobytes * 1000 - len(image))) for n in range(20_000 // kilobytes)]
        write_tar(folder / "a.tar", [("a.txt", bytes(number * 60_000)), *members])
        found.append(counts_of(folder, 5).held / (20_000 // kilobytes))
    assert sum(found) / 4 == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("compression", [None, "gz"])
def test_a_tar_s_bytes_are_those_of_all_that_it_holds(
    compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each photograph a mask of noise, which is as large; and both may be compressed."""
    noise = random.Random(0)
    members = [
        member
        for number in range(400)
        for member in ((f"{number}.png", png(noise)), (f"{number}.npy", noise.randbytes(20_000)))
    ]
    content = tar_bytes(members)
    path = tmp_path / ("a.tar.gz" if compression else "a.tar")
    path.write_bytes(gzip.compress(content, 1) if compression else content)
    monkeypatch.setattr(sample_reading, "COUNTED_BYTES", 4 * 2**20)
    found = counts_of(tmp_path, 10)
    assert (found.tried, found.decoded) == (10, 10)
    assert 50 < found.read < 300, "it was not read to its end"
    assert (found.held, found.num_bytes) == (pytest.approx(400, rel=0.05), path.stat().st_size)


def test_shards_of_small_and_of_large_images_count_by_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one kind come first, as where names say what is in them."""
    noise = random.Random(0)
    small, large = png(noise, 16), png(noise)
    for number in range(2):
        write_tar(tmp_path / f"a{number}.tar", [(f"{n}.png", small) for n in range(3000)])
        write_tar(tmp_path / f"b{number}.tar", [(f"{n}.png", large) for n in range(300)])
    monkeypatch.setattr(sample_reading, "COUNTED_BYTES", 2**20)
    monkeypatch.setattr(sample_reading, "MIN_COUNTED_BYTES", 3 * 2**20)
    found = counts_of(tmp_path, 40)
    assert found.tried == 40
    assert found.read < 5000, "they were not read to their ends"
    assert found.held == pytest.approx(6600, rel=0.05)
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def test_a_parquet_file_says_how_many_rows_it_has(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = [png(noise) for _ in range(300)]
    table = pa.table({"image": images, "text": pa.array([noise.randbytes(5000).hex() for _ in images])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert counts_of(tmp_path, 10) == Counts(10, 0, 10, 10, 300, (tmp_path / "a.parquet").stat().st_size)


def test_rows_without_an_image_are_counted_as_what_they_are(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = [png(noise) if number % 2 else None for number in range(300)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    assert counts_of(tmp_path, 20) == Counts(40, 20, 20, 20, 300, (tmp_path / "a.parquet").stat().st_size)
    ended = counts_of(tmp_path, 1000)
    assert (ended.read, ended.unreadable, ended.decoded, ended.held) == (300, 150, 150, 300)


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_even_be_read_is_not_predicted(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = [png(noise) if number % 4 else None for number in range(40)]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "shards" / "a.parquet")
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))
    found = sampling.measure(config, *model_and_dataset(config), make_plan(config))
    assert found is not None
    assert found.predicted == 0.75


@pytest.mark.usefixtures("ray_cluster")
def test_large_images_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their pixels would be gigabytes, which the driver hands on."""
    digits_tars(tmp_path / "shards", 4, 40)
    monkeypatch.setattr(sampling, "MAX_BYTES", 2 * 9 * 3 * 32 * 32)
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))
    found = sampling.measure(config, *model_and_dataset(config), make_plan(config))
    assert found is not None
    assert 16 <= found.images <= 20


def test_a_row_takes_no_share_of_what_a_part_has_once(tmp_path: Path) -> None:
    digits_tars(tmp_path, 1, 400)
    job = job_of(tmp_path, output={"embeddings": False})
    shards = [task.shard for task in make_plan(job.config).tasks]
    block = read_and_decode(shards, job.config, job.spec.transform, 400, 10**9).block
    rows = ResNetPredictor(job.spec, job.info, job.settings)(block)
    few, whole = sampling._sizes(rows.slice(0, 32), job), sampling._sizes(rows, job)
    size = whole.part_bytes + 400 * whole.row_bytes  # as it was written
    assert few.part_bytes + 400 * few.row_bytes == pytest.approx(size, rel=0.3)
    assert few.part_bytes > size / 2, "of so small rows"


def test_loose_files_are_known_from_their_listing(tmp_path: Path) -> None:
    noise = random.Random(0)
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png(noise))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    found = counts_of(tmp_path, 1)
    assert (found.held, found.num_bytes) == (30, size)


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_decoded_is_not_predicted(tmp_path: Path) -> None:
    """Nor does it take a row's place in the output."""
    digits_tars(tmp_path / "shards", 1, 40, broken=range(0, 40, 4))
    config = make_config(digits_config(tmp_path / "shards", tmp_path / "labels", **NOOP))
    found = sampling.measure(config, *model_and_dataset(config), make_plan(config))
    assert found is not None
    assert found.predicted == 0.75


@pytest.mark.parametrize(
    ("images", "batch_size", "timed"), [(300, 128, (256, 1.0)), (128, 128, (128, 1.0)), (32, 128, (32, 0.25))]
)
def test_the_network_is_timed_without_padding(images: int, batch_size: int, timed: tuple[int, float]) -> None:
    assert sampling.full_batches(images, batch_size) == timed


@pytest.mark.parametrize(
    ("images", "crop", "timed", "seconds"),
    [(50, 32, 32, 0.2 / 32), (19, 32, 16, 0.2 / 16), (2, 32, 2, 0.2 / 8), (2, None, 2, 0.2 / 2)],
)
def test_seconds_per_image_are_those_of_full_batches(
    images: int, crop: int | None, timed: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that takes 0.2 s, with batches of 8. Images of their own size are in batches of their own as well."""
    digits_tars(tmp_path, 1, images)
    job = job_of(tmp_path, model={"name": "resnet18", "weights": "random", "transform": {"resize": 32, "crop": crop}})
    shards = [task.shard for task in make_plan(job.config).tasks]
    predicted: list[int] = []

    class Slow(ResNetPredictor):
        def __call__(self, block: Any) -> Any:
            predicted.append(block.num_rows)
            time.sleep(0.2)
            return super().__call__(block)

    monkeypatch.setattr(sampling, "ResNetPredictor", Slow)
    monkeypatch.setattr(sampling, "PREDICT_SECONDS", 0.0)
    found = sampling._time_predictor(
        [read_and_decode(shards, job.config, job.spec.transform, images, 10**9).block], job
    )
    assert predicted == [min(images, 8), min(images, 8), timed, timed], (
        "a batch to warm up, one to see how many to time"
    )
    assert found is not None
    assert seconds <= 2 * found[0] < 1.8 * seconds, "two calls at once, as in a run"


def test_images_of_their_own_sizes_are_timed_in_any_order_and_those_that_fail_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones may all be large, and of one shard. Here those with an odd number fail."""
    digits_tars(tmp_path, 1, 64)
    transform = {"resize": None, "crop": None}
    job = job_of(tmp_path, model={"name": "resnet18", "weights": "random", "transform": transform})
    shards = [task.shard for task in make_plan(job.config).tasks]
    block = read_and_decode(shards, job.config, job.spec.transform, 64, 10**9).block
    timed: list[int] = []

    class Failing(ResNetPredictor):
        def __call__(self, block: pa.Table) -> pa.Table:
            time.sleep(0.02 * block.num_rows)
            timed[:] = block["index"].to_pylist()
            pieces = super().__call__(block)
            kinds = pa.array([Kind.ERROR if n % 2 else Kind.SAMPLE for n in pieces["index"].to_pylist()], pa.uint8())
            return pieces.set_column(pieces.schema.get_field_index("kind"), "kind", kinds)

    monkeypatch.setattr(sampling, "ResNetPredictor", Failing)
    monkeypatch.setattr(sampling, "PREDICT_SECONDS", 0.6)
    found = sampling._time_predictor([block.slice(0, 32), block.slice(32)], job)
    assert found is not None
    seconds, _, share = found
    assert 16 <= len(timed) < 64, "about as many as take the time"
    assert min(timed) < 20, "of all blocks"
    assert max(timed) > 43
    assert share == sum(n % 2 == 0 for n in timed) / len(timed)
    assert 0.01 <= seconds * share < 0.02, "two calls at once"


def test_what_starts_a_reader_reads_no_more_than_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits_tars(tmp_path, 1, 64)
    job, decoded = job_of(tmp_path), list[int]()
    original = sampling.read_rows

    def counted(*given: Any) -> Any:
        for row in original(*given):
            decoded.append(row.index)
            yield row

    monkeypatch.setattr(sampling, "read_rows", counted)
    (task,) = make_plan(job.config).tasks
    sampling._decode_one(task.shard, job)
    assert decoded == [0]
