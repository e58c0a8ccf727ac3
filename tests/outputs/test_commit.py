"""Pieces become a part, and the part appears: whole, once, with the same bytes for the same rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ModelMismatch, SourceChanged, TransientError
from pipeline.outputs.commit import retire_shard
from pipeline.outputs.dataset import Dataset
from pipeline.storage import Store
from tests.support.pieces import (
    BOTH,
    IDENTITY,
    commit,
    new_dataset,
    piece,
    shard_id,
)

ROOT = Path(__file__).resolve().parents[2]
NEW = "2" * 16


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return new_dataset(tmp_path / "labels")


def part(dataset: Dataset, folder: str = "data", number: int = 0) -> Path:
    return Path(dataset.url, folder, f"{shard_id(number)}.parquet")


def snapshot(dataset: Dataset) -> dict[Path, tuple[bytes, int]]:
    """Every file with its content and the time of its writing."""
    files = [path for path in Path(dataset.url).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- Committing ------------------------------------------------------------------------------------------------------


def test_a_changed_source_writes_nothing(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3))], 3)
    before = snapshot(dataset)
    with pytest.raises(SourceChanged, match="changed since it was listed"):
        commit(dataset, [piece(BOTH, 0, range(4))], 4, fingerprint=NEW, current=lambda: "3" * 16)
    assert snapshot(dataset) == before


def test_a_dataset_of_another_model_is_not_written_to(dataset: Dataset):
    path = Path(dataset.url, "_dataset.json")
    path.write_text(path.read_text().replace(IDENTITY["model_fingerprint"], "f" * 16))
    before = snapshot(dataset)
    with pytest.raises(ModelMismatch, match=f'the dataset has "{"f" * 16}", this run'):
        commit(dataset, [piece(BOTH, 0, range(3))], 3)
    assert snapshot(dataset) == before


class Claimed(Store):
    """Another model claims the dataset as soon as the part stands."""

    def put(self, url: str, data: bytes | Path) -> str:
        version = super().put(url, data)
        if "/data/" in url:
            path = Path(url.partition("/data/")[0], "_dataset.json")
            path.write_text(path.read_text().replace(IDENTITY["model_fingerprint"], "f" * 16))
        return version


@pytest.mark.parametrize("stood_before", [True, False])
def test_a_part_is_withdrawn_if_another_model_has_claimed_the_dataset(dataset: Dataset, stood_before: bool):
    if stood_before:
        commit(dataset, [piece(BOTH, 0, range(2))], 2)
    with pytest.raises(ModelMismatch):
        commit(replace(dataset, store=Claimed()), [piece(BOTH, 0, range(3), errors=[0])], 3, fingerprint=NEW)
    assert part(dataset).exists() == part(dataset, "errors").exists() == stood_before
    assert not list(Path(dataset.url, "_ledger").glob("*"))


def test_what_is_committed_already_is_not_written_again(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3)
    before = snapshot(dataset)
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3, current=lambda: pytest.fail("no need to look"))
    assert snapshot(dataset) == before


def test_of_two_commits_at_once_one_is_believed(dataset: Dataset):
    """One has looked before the other, which then wrote everything: of two marks none would be believed."""
    rows = [piece(BOTH, 0, range(3))]
    seen: list[bool] = []

    def current() -> str:
        if not seen:
            seen.append(True)
            assert commit(dataset, rows, 3).is_ours
        return "1" * 16

    assert commit(dataset, rows, 3, current=current).is_ours
    assert dataset.standing()[shard_id(0)].fingerprint == "1" * 16
    assert not commit(dataset, rows, 3).is_ours


def test_commits_that_undo_each_other_end(dataset: Dataset):
    class Rival(Store):
        """Puts a mark of its own beside each of ours."""

        def put(self, url: str, data: bytes | Path) -> str:
            if "/_ledger/" in url:
                super().put(f"{url.rpartition('.')[0].rpartition('.')[0]}.{'0' * 16}.json", data)
            return super().put(url, data)

    with pytest.raises(TransientError, match=r"another run commits 0\.tar-0+ at the same time. Run again"):
        commit(replace(dataset, store=Rival()), [piece(BOTH, 0, range(3))], 3)


def test_the_errors_part_goes_when_nothing_fails_this_time(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3)
    commit(dataset, [piece(BOTH, 0, range(3))], 3, fingerprint=NEW)
    assert not part(dataset, "errors").exists()
    assert dataset.standing()[shard_id(0)].fingerprint == NEW


def test_vanished_groups_are_retired_after_the_check_and_before_the_part(dataset: Dataset):
    for number in (1, 2):
        commit(dataset, [piece(BOTH, number, range(3), errors=[0])], 3, number=number)
    retires = (shard_id(1), shard_id(2))
    with pytest.raises(SourceChanged):
        commit(dataset, [piece(BOTH, 0, range(3))], 3, current=lambda: NEW, retires=retires)
    assert dataset.standing().keys() == {shard_id(1), shard_id(2)}
    commit(dataset, [piece(BOTH, 0, range(3))], 3, retires=retires)
    assert dataset.standing().keys() == {shard_id(0)}
    commit(dataset, [piece(BOTH, 1, range(3))], 3, number=1)
    commit(dataset, [piece(BOTH, 0, range(3))], 3, retires=retires)
    assert dataset.standing().keys() == {shard_id(0)}, "also where the shard itself is committed already"


def test_a_redo_replaces_the_commit_that_it_names_and_leaves_a_rivals_alone(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3)
    mark = dataset.standing_of(shard_id(0)).valid_mark
    assert mark is not None
    commit(dataset, [piece(BOTH, 0, range(3))], 3, replaces=mark.commit)
    assert pq.read_table(part(dataset))["index"].to_pylist() == [0, 1, 2]
    assert not part(dataset, "errors").exists()
    (redone,) = dataset.standing_of(shard_id(0)).marks
    assert redone == dataset.standing_of(shard_id(0)).valid_mark != mark
    before = snapshot(dataset)
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3, replaces=mark.commit)
    assert snapshot(dataset) == before, "another one has redone it meanwhile"


def test_a_shard_is_retired_only_if_what_was_shown_stands(dataset: Dataset):
    commit(dataset, [piece(BOTH, 0, range(3), errors=[1])], 3)
    commit(dataset, [piece(BOTH, 1, range(3), errors=[1])], 3, number=1)
    shown = dataset.standing_of(shard_id(0))
    commit(dataset, [piece(BOTH, 0, range(3))], 3, fingerprint=NEW)
    before = snapshot(dataset)
    assert not retire_shard(dataset, shard_id(0), shown)
    assert snapshot(dataset) == before
    assert retire_shard(dataset, shard_id(0), dataset.standing()[shard_id(0)])
    assert dataset.standing().keys() == {shard_id(1)}


class Death(BaseException):
    """The end of the process, as far as the code under test can tell."""


class DyingStore(Store):
    """Dies at the k-th call, before or after it has done its work."""

    def __init__(self, calls: int, before: bool) -> None:
        super().__init__()
        self._calls, self._before = calls, before

    def _counted(self, method: Callable[..., Any], *args: Any) -> Any:
        self._calls -= 1
        if self._calls == 0 and self._before:
            raise Death
        answer = method(*args)
        if self._calls == 0:
            raise Death
        return answer

    def starting_with(self, *args: Any) -> Any:
        return self._counted(super().starting_with, *args)

    def info(self, *args: Any) -> Any:
        return self._counted(super().info, *args)

    def read(self, *args: Any) -> Any:
        return self._counted(super().read, *args)

    def put(self, *args: Any) -> Any:
        return self._counted(super().put, *args)

    def delete(self, *args: Any) -> Any:
        return self._counted(super().delete, *args)


OLD_ROWS = [piece(BOTH, 0, range(30), errors=[3, 4])]
NEW_ROWS = {"error rows": [piece(BOTH, 0, range(20), [5], salt=1)], "none": [piece(BOTH, 0, range(20), salt=1)]}


def contents(dataset: Dataset, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(dataset.url, folder).glob("*")}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("new", NEW_ROWS.values(), ids=NEW_ROWS.keys())
def test_death_at_any_step_leaves_whole_parts_and_the_next_run_makes_it_right(
    tmp_path: Path, new: Sequence[pa.Table], before: bool
):
    undisturbed = new_dataset(tmp_path / "undisturbed")
    commit(undisturbed, new, 20, fingerprint=NEW)
    for deaths in range(20):
        dataset = new_dataset(tmp_path / str(deaths))
        commit(dataset, OLD_ROWS, 30)
        dying = replace(dataset, store=DyingStore(deaths + 1, before))
        try:
            commit(dying, new, 20, fingerprint=NEW)
        except Death:
            has_died = True
        else:
            has_died = False
        assert pq.read_table(part(dataset)).num_rows in (28, 20, 19)
        if dataset.standing()[shard_id(0)].fingerprint == NEW:
            assert contents(dataset, "data") == contents(undisturbed, "data")
        commit(dataset, new, 20, fingerprint=NEW)
        assert dataset.standing()[shard_id(0)].fingerprint == NEW
        assert contents(dataset, "data") == contents(undisturbed, "data")
        assert contents(dataset, "errors") == contents(undisturbed, "errors")
        assert len(contents(dataset, "_ledger")) == 1
        if not has_died:
            break
    assert deaths >= 9, "each step of a commit has been the last one"
    assert not has_died


# --- A reader who globs all the while --------------------------------------------------------------------------------

SIZES = (50, 57, 64)  # the rows of generation g are SIZES[g % 3]


def read_with_pyarrow(folder: Path) -> pa.Table:
    """Opens each part once."""
    return pa.concat_tables(
        [pq.ParquetFile(path).read(["key", "shard"]) for path in sorted(folder.glob("data/*.parquet"))]
    )


def read_with_duckdb(folder: Path) -> pa.Table:
    """DuckDB opens a part twice, for its schema and for its rows: where it was replaced in between, it must be an
    error, not half a part, and reading again must do."""
    for _ in range(50):
        with suppress(duckdb.Error), duckdb.connect() as connection:
            return connection.sql(f"select * from '{folder}/data/*.parquet'").to_arrow_table()
    raise AssertionError("no read succeeds")


@pytest.mark.parametrize("read", [read_with_pyarrow, read_with_duckdb])
def test_a_reader_never_sees_a_shard_missing_doubled_or_broken(dataset: Dataset, read: Callable[[Path], pa.Table]):
    urls = [f"file:///in/{number}.tar" for number in range(3)]
    for number in range(3):
        commit(dataset, [piece(BOTH, number, range(50))], 50, number=number)
    stop, problems, reads = threading.Event(), list[str](), 0

    def keep_reading() -> None:
        nonlocal reads
        while not stop.is_set():
            try:
                rows = read(Path(dataset.url)).select(["shard", "key"]).to_pylist()
                for url in urls:
                    (generation,) = {row["key"].partition("/")[0] for row in rows if row["shard"] == url}
                    assert sum(row["shard"] == url for row in rows) == SIZES[int(generation) % 3]
            except (Exception, AssertionError) as error:  # noqa: BLE001 - whatever it is, a reader must not see it
                problems.append(repr(error))
                return
            reads += 1

    reader = threading.Thread(target=keep_reading)
    reader.start()
    generation = 0
    while (generation < 100 or reads < 20) and not problems:
        generation += 1
        size = SIZES[generation % 3]
        rows = piece(BOTH, 1, range(size), salt=generation)
        commit(dataset, [rows], size, number=1, fingerprint=f"{generation:016x}")
    stop.set()
    reader.join()
    assert problems == []
