"""Whose a dataset is, what stands in it, and its rows as a table."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, FatalError, ModelMismatch, NotFound, SourceChanged
from pipeline.outputs.dataset import Dataset, Identity, dataset_card, make_identity, read_table
from pipeline.outputs.ledger import Standing
from pipeline.outputs.schema import errors_schema
from pipeline.storage import Store
from tests.support.pieces import BOTH, IDENTITY, commit, new_dataset, piece, shard_id

OTHER = make_identity(
    {"name": "resnet50", "weights": "IMAGENET1K_V1", "columns": {"top_k": 3}}, "f" * 16, ["cat", "dog"], 2
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path / "labels"), Store())


def identity_file(dataset: Dataset) -> Path:
    return Path(dataset.url, "_dataset.json")


# --- The claim -------------------------------------------------------------------------------------------------------


def test_the_first_claim_says_what_the_dataset_is(dataset: Dataset):
    assert dataset.identity() is None
    dataset.check_identity(IDENTITY)
    dataset.claim_identity(IDENTITY)
    assert dataset.identity() == IDENTITY
    assert json.loads(identity_file(dataset).read_text())["format_version"] == "1"
    assert Path(dataset.url, "README.md").read_text() == dataset_card(IDENTITY)


def test_the_same_claim_again_writes_nothing(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    Path(dataset.url, "README.md").write_text("my own words")
    before = identity_file(dataset).stat().st_mtime_ns
    dataset.claim_identity(IDENTITY)
    assert identity_file(dataset).stat().st_mtime_ns == before
    assert Path(dataset.url, "README.md").read_text() == "my own words"


@pytest.mark.parametrize("check", [Dataset.check_identity, Dataset.claim_identity, Dataset.confirm_identity])
def test_another_model_is_refused_and_each_difference_named(dataset: Dataset, check: Any):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0])], 1)
    with pytest.raises(ModelMismatch) as error:
        check(dataset, OTHER)
    assert str(error.value).splitlines()[1:] == [
        "  model.columns.top_k: the dataset has null, this run 3",
        '  model.name: the dataset has "resnet18", this run "resnet50"',
        '  model_fingerprint: the dataset has "0123456789abcdef", this run "ffffffffffffffff"',
    ]
    assert "must not mix" in str(error.value)
    assert dataset.identity() == IDENTITY


def test_a_plan_that_knows_no_classes_yet_names_no_difference_in_them(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0])], 1)
    with pytest.raises(ModelMismatch) as error:
        dataset.check_identity({"model_fingerprint": "f" * 16, "model": {**IDENTITY["model"], "name": "resnet50"}})
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "model.name",
        "model_fingerprint",
    ]


def test_a_dataset_without_part_and_mark_may_be_claimed_anew(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    dataset.claim_identity(OTHER)
    assert dataset.identity() == OTHER
    assert "resnet50" in Path(dataset.url, "README.md").read_text()
    with pytest.raises(ModelMismatch, match="resnet50"):
        commit(dataset, [piece(BOTH, 0, [0])], 1)  # of the first model, whose run still goes on


@pytest.mark.parametrize("words", [b"notes", dataset_card(IDENTITY).encode() + b"and what I found", b"caf\xe9"])
def test_a_readme_of_somebody_else_stays_when_the_dataset_is_claimed_anew(dataset: Dataset, words: bytes):
    readme = Path(dataset.url, "README.md")
    dataset.claim_identity(IDENTITY)
    readme.write_bytes(words)
    dataset.claim_identity(OTHER)
    assert dataset.identity() == OTHER
    assert readme.read_bytes() == words


@pytest.mark.parametrize("stands", ["data", "_ledger"])
def test_a_part_or_a_mark_is_enough_to_keep_another_model_out(dataset: Dataset, stands: str):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0])], 1)
    for path in Path(dataset.url, "_ledger" if stands == "data" else "data").iterdir():
        path.unlink()
    with pytest.raises(ModelMismatch):
        dataset.claim_identity(OTHER)
    dataset.claim_identity(IDENTITY)


def test_of_two_racers_with_two_models_at_most_one_commits(tmp_path: Path):
    def run(dataset: Dataset, number: int, identity: Identity) -> bool:
        barrier.wait()
        try:
            dataset.claim_identity(identity)
            commit(dataset, [piece(BOTH, number, [0])], 1, number=number, identity=identity)
        except ModelMismatch:
            return False
        return True

    barrier = threading.Barrier(2)
    for number in range(30):
        dataset = Dataset(str(tmp_path / str(number)), Store())
        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(run, [dataset] * 2, range(2), [IDENTITY, OTHER]))
        assert won != [True, True]
        parts = list(Path(dataset.url).glob("data/*.parquet"))
        assert len(parts) == sum(won)
        if parts:
            assert dataset.identity() == (IDENTITY if won[0] else OTHER)
            assert dataset.owner() == (IDENTITY if won[0] else OTHER)["model_fingerprint"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"words"', "{}", '{"format_version": "1", "model_fingerprint": "a"}'])
def test_a_foreign_description_is_an_error_that_names_it(dataset: Dataset, text: str):
    dataset.claim_identity(IDENTITY)
    identity_file(dataset).write_text(text)
    with pytest.raises(FatalError, match=r"_dataset\.json is not the description of a dataset of ours"):
        dataset.claim_identity(IDENTITY)
    assert identity_file(dataset).read_text() == text


def test_a_format_of_the_future_is_refused(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    identity_file(dataset).write_text(json.dumps(IDENTITY | {"format_version": "2"}))
    with pytest.raises(FatalError, match=r"has format version 2; this program writes 1"):
        dataset.check_identity(IDENTITY)


def test_a_lost_description_is_written_again_by_the_model_that_owns_the_rows(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0])], 1)
    identity_file(dataset).unlink()
    with pytest.raises(ModelMismatch, match=IDENTITY["model_fingerprint"]):
        dataset.claim_identity(OTHER)
    dataset.claim_identity(IDENTITY)
    assert dataset.identity() == IDENTITY


def test_a_folder_with_parquet_files_of_others_is_refused(dataset: Dataset):
    Path(dataset.url, "data").mkdir(parents=True)
    pq.write_table(pa.table({"image": [b""]}), Path(dataset.url, "data/train-00000.parquet"))
    with pytest.raises(FatalError, match="holds files that are not ours"):
        dataset.check_identity(IDENTITY)


def test_files_that_nobody_would_read_as_rows_keep_nobody_out(dataset: Dataset):
    for name in ("data/.DS_Store", "data/notes.txt", "_ledger/notes.txt", "anything.parquet"):
        path = Path(dataset.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not ours")
    dataset.claim_identity(IDENTITY)
    assert dataset.owner() is None


# --- What stands -----------------------------------------------------------------------------------------------------


def test_nothing_stands_where_there_is_no_folder(dataset: Dataset):
    assert dataset.standing() == {}
    assert dataset.standing_of("a") == Standing()


def test_what_stands_is_the_same_looked_at_whole_and_by_shard(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0, 1], errors=[1])], 2, number=0)
    commit(dataset, [piece(BOTH, 1, [0])], 1, number=1)
    Path(dataset.url, "data/notes.txt").write_text("not ours")
    Path(dataset.url, "_ledger/notes.txt").write_text("not ours")
    Path(dataset.url, "data/deeper").mkdir()
    Path(dataset.url, f"data/deeper/{shard_id(1)}.parquet").write_text("not ours")
    standing = dataset.standing()
    assert standing.keys() == {shard_id(0), shard_id(1)}
    for name, found in standing.items():
        assert dataset.standing_of(name) == found
        assert found.fingerprint == "1" * 16
    assert (standing[shard_id(0)].errors is None, standing[shard_id(1)].errors is None) == (False, True)


def test_what_stands_is_the_same_however_a_listing_orders_marks(dataset: Dataset):
    ledger = Path(dataset.url, "_ledger")
    ledger.mkdir(parents=True)
    for name in (f"{shard}.{mark}.{mark}.json" for shard in "abcdefgh" for mark in "321"):
        (ledger / name).write_text("{}")
    standing = dataset.standing()
    assert all(dataset.standing_of(shard) == standing[shard] for shard in "abcdefgh")


def test_marks_of_a_longer_id_are_not_a_shards_own(dataset: Dataset):
    """Ids hold dots, and marks are found by the beginning of their name."""
    ledger = Path(dataset.url, "_ledger")
    ledger.mkdir(parents=True)
    for name in ("a.f.c.json", "a.tar-1.f.c.json"):
        (ledger / name).write_text("{}")
    assert [mark.shard_id for mark in dataset.standing_of("a").marks] == ["a"]


def test_what_stands_says_which_shard_it_is_of_as_long_as_any_of_it_stands(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, [0, 1], errors=[1])], 2)
    Path(dataset.url, "data/foreign.parquet").write_bytes(b"no Parquet at all")
    Path(dataset.url, "_ledger/foreign.a.b.json").write_text("[]")
    for gone, footers in {"": 1, "_ledger": 2, "data": 1}.items():  # the mark, both parts, the errors part
        for path in Path(dataset.url, gone or "nowhere").glob("0.*"):
            path.unlink()
        before = dataset.standing()
        found = dataset.footers_of(before)
        assert [footer.shard for footer in found[shard_id(0)]] == ["file:///in/0.tar"] * footers
        assert found["foreign"] == []
    next(Path(dataset.url, "errors").iterdir()).unlink()
    assert dataset.footers_of(before)[shard_id(0)] == [], "a rival has retired it since it was listed"


def test_marks_that_a_rival_has_deleted_are_left_out(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    for number in range(2):
        commit(dataset, [piece(BOTH, number, [0])], 1, number=number)
    marks = [mark for found in dataset.standing().values() for mark in found.marks]
    next(Path(dataset.url, "_ledger").glob("0.*")).unlink()
    assert [body["shard"] for body in dataset.read_marks(marks)] == ["file:///in/1.tar"]


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_all_rows_as_one_table(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    for number in range(3):
        commit(dataset, [piece(BOTH, number, [2, 0, 1], errors=[1])], 3, number=number)
    rows = read_table(dataset, "data")
    assert list(zip(rows["shard"].to_pylist(), rows["index"].to_pylist(), strict=True)) == [
        (f"file:///in/{number}.tar", index) for number in range(3) for index in (0, 2)
    ]
    assert read_table(dataset, "errors")["index"].to_pylist() == [1, 1, 1]
    assert read_table(dataset, "data", ["index", "key"]).column_names == ["index", "key"]


def test_there_is_nothing_to_read_yet(dataset: Dataset):
    with pytest.raises(NotFound, match="there is no dataset at"):
        read_table(dataset, "data")
    dataset.claim_identity(IDENTITY)
    with pytest.raises(NotFound, match=r"no shard of .* is committed yet"):
        read_table(dataset, "data")
    assert read_table(dataset, "errors").schema == errors_schema()
    with pytest.raises(ConfigError, match="has no column nocol; there are key, shard"):
        read_table(dataset, "errors", ["nocol"])
    commit(dataset, [], 0)
    assert read_table(dataset, "data").num_rows == 0
    assert "embedding" in read_table(dataset, "data").column_names


class Busy(Store):
    """A store on which one part is replaced, and one retired, while they are read."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        if "/data/1" in url:
            raise NotFound("retired")
        if "/data/2" in url and self.times:
            self.times -= 1
            raise SourceChanged("replaced")
        return super().open(url, version, read_ahead)


def test_a_part_that_is_replaced_or_retired_meanwhile_does_not_disturb_a_reader(dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    for number in range(3):
        commit(dataset, [piece(BOTH, number, [0])], 1, number=number)
    rows = read_table(replace(dataset, store=Busy(3)), "data")
    assert rows["shard"].to_pylist() == ["file:///in/0.tar", "file:///in/2.tar"]
    with pytest.raises(SourceChanged):
        read_table(replace(dataset, store=Busy(99)), "data")


def test_the_card_names_the_model(tmp_path: Path):
    dataset = new_dataset(tmp_path)
    card = Path(dataset.url, "README.md").read_text()
    assert "`resnet18`, weights `IMAGENET1K_V1`" in card
    assert IDENTITY["model_fingerprint"] in card
