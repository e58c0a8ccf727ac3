"""What the rounds of violence look for, planted once each, to see that it is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store
from tests.support.chaos import Round
from tests.support.datasets import commit_all, mark, part, rewrite, set_column, vouch
from tests.support.jobs import digits_config, digits_tars
from tests.support.s3 import S3Server, s3_server
from tests.support.soundness import Expected, InBucket, OnDisk, Reader, violations

SHARDS, PER_SHARD, BROKEN_AT = 3, 12, 5


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Expected]:
    """The config of a finished dataset, and what stands in it."""
    folder = tmp_path_factory.mktemp("sound")
    digits_tars(folder / "shards", SHARDS, PER_SHARD, broken=[BROKEN_AT])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config)
    return config, Expected.of(config)


@pytest.fixture
def config(job: tuple[dict[str, Any], Expected], tmp_path: Path) -> dict[str, Any]:
    """A copy to damage."""
    shutil.copytree(job[0]["output"]["url"], tmp_path / "labels", copy_function=shutil.copy2)
    return job[0] | {"output": {"url": str(tmp_path / "labels")}}


@pytest.fixture
def dataset(config: dict[str, Any]) -> Dataset:
    return Dataset(config["output"]["url"], Store())


@pytest.fixture
def found(config: dict[str, Any], job: tuple[dict[str, Any], Expected]) -> Callable[[], list[str]]:
    """Everything that is wrong with the copy."""
    return lambda: violations(config, OnDisk(Path(config["output"]["url"])), job[1])


def change_rows(dataset: Dataset, change: Callable[[pa.Table], pa.Table], folder: str = "data", **footer: Any) -> None:
    """Other rows in the first part, with a mark that vouches for them: a commit that went wrong in every step."""
    rewrite(part(dataset, 0, folder), change, **footer)
    if folder == "errors":
        rewrite(part(dataset), **footer)
    vouch(dataset, part(dataset).stem)


def test_a_finished_dataset_is_sound(found: Callable[[], list[str]]):
    assert found() == []


def test_a_lost_row(dataset: Dataset, found: Callable[[], list[str]]):
    lost = {"listed": PER_SHARD - 1, "predicted": PER_SHARD - 2}
    change_rows(dataset, lambda rows: rows.slice(0, rows.num_rows - 1), **lost)
    assert any(p.startswith("lost: ") and p.endswith(f"digits-000.tar index {PER_SHARD - 1}") for p in found())


def test_a_doubled_row(dataset: Dataset, found: Callable[[], list[str]]):
    change_rows(dataset, lambda rows: pa.concat_tables([rows, rows.slice(3, 1)]), predicted=PER_SHARD)
    assert any(p.startswith("doubled or unknown: ") and p.endswith("digits-000.tar index 3") for p in found())


def test_a_wrong_value(dataset: Dataset, found: Callable[[], list[str]]):
    def change(rows: pa.Table) -> pa.Table:
        return set_column("embedding", 2, [0.5] * rows.schema.field("embedding").type.list_size)(rows)

    change_rows(dataset, change)
    problems = found()
    assert len(problems) == 1, "only the comparison with the undisturbed run can see it"
    assert problems[0].startswith("other row: ")
    assert problems[0].endswith("digits-000.tar index 2")


def test_an_error_row_that_is_missing(dataset: Dataset, found: Callable[[], list[str]]):
    footer = {"errors": 0, "listed": PER_SHARD - 1}
    change_rows(dataset, lambda rows: rows.slice(0, 0), folder="errors", **footer)
    assert any(p.startswith("lost: ") and p.endswith(f"index {BROKEN_AT}") for p in found())


def test_an_error_row_of_another_class(dataset: Dataset, found: Callable[[], list[str]]):
    change_rows(dataset, set_column("error", 0, "too_large"), folder="errors")
    assert [p.partition(":")[0] for p in found()] == ["other error row"]


def test_a_part_of_an_old_version(dataset: Dataset, found: Callable[[], list[str]]):
    rewrite(part(dataset), shard_fingerprint="2" * 16)
    assert any(p.startswith("mark of other versions: digits-000.tar") for p in found())


def test_a_mark_too_many(dataset: Dataset, found: Callable[[], list[str]]):
    shutil.copy(mark(dataset), mark(dataset).with_name(mark(dataset).name.replace(".json", "0.json")))
    assert any(p.startswith("2 marks: digits-000.tar") for p in found())


def test_a_mark_that_is_missing(dataset: Dataset, found: Callable[[], list[str]]):
    mark(dataset).unlink()
    assert any(p.startswith("0 marks: digits-000.tar") for p in found())


def test_a_part_of_a_shard_that_nobody_listed(dataset: Dataset, found: Callable[[], list[str]]):
    shutil.copy(part(dataset), part(dataset).with_name("other.tar-0123456789abcdef.parquet"))
    assert "part of no shard: other.tar-0123456789abcdef" in found()


@pytest.mark.parametrize("name", ["data/.0a1b.tmp", "data/x.parquet.tmp", "tmp/piece", "_ledger/.0a1b.tmp"])
def test_a_temporary_file_that_was_left(name: str, dataset: Dataset, found: Callable[[], list[str]]):
    path = Path(dataset.url, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    assert f"leftover: {name}" in found()


# --- A reader that looks all the while -------------------------------------------------------------------------------


@pytest.fixture
def reader(dataset: Dataset, job: tuple[dict[str, Any], Expected]) -> Reader:
    """One that has looked once and found nothing."""
    reader = Reader(OnDisk(Path(dataset.url)), job[1])
    reader.look()
    assert not reader.problems
    return reader


def test_the_reader_sees_half_a_file(reader: Reader, dataset: Dataset):
    part(dataset).write_bytes(part(dataset).read_bytes()[:-100])
    reader.look()
    assert [p for p in reader.problems if "is not whole" in p]


def test_the_reader_sees_half_a_shard(reader: Reader, dataset: Dataset):
    rewrite(part(dataset), lambda rows: rows.slice(0, 4))
    reader.look()
    assert [p for p in reader.problems if "has other rows than its shard" in p]


def test_the_reader_sees_a_shard_twice(reader: Reader, dataset: Dataset):
    shutil.copy(part(dataset), part(dataset).with_name("again.parquet"))
    reader.look()
    assert [p for p in reader.problems if p.startswith("reader: twice: ")]


def test_the_reader_sees_a_part_that_vanishes(reader: Reader, dataset: Dataset):
    part(dataset).unlink()
    reader.look()
    assert [p for p in reader.problems if p.endswith("vanished")]


# --- On S3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server() as server:
        server.become(monkeypatch, server.owner)
        yield server
        storage._remote.cache_clear()


def test_a_bucket_and_an_upload_that_was_never_finished(
    server: S3Server, job: tuple[dict[str, Any], Expected], tmp_path: Path
):
    config, expected = job
    config = config | {"output": {"url": "s3://labels/digits", "storage": {"endpoint_url": server.endpoint_url}}}
    commit_all(config)
    client = server.client(server.owner)
    place = InBucket(client, "labels", "digits")
    assert violations(config, place, expected) == []
    client.create_multipart_upload(Bucket="labels", Key="digits/data/big.parquet")
    assert violations(config, place, expected) == ["unfinished multipart upload: data/big.parquet"]
    reader = Reader(place, expected)
    reader.look()
    assert (reader.looks, reader.problems) == (1, set())


# --- Rounds ----------------------------------------------------------------------------------------------------------


def test_a_seed_says_all_of_a_round():
    assert [Round.of(seed) for seed in range(50)] == [Round.of(seed) for seed in range(50)]
    rounds = [Round.of(seed) for seed in range(300)]
    assert len({str(strike) for r in rounds for strike in r.strikes}) > 300
    assert {"disk", "s3"} == {r.store for r in rounds}
