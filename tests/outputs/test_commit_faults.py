"""A commit on a real S3 server whose N-th request fails, for every N: what stands is right or known not to be.

After each, one commit without faults makes everything right, and nothing is left over.
"""

from __future__ import annotations

import errno
import io
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Storage
from pipeline.errors import StoreFull, TransientError
from pipeline.outputs.dataset import Dataset, read_table
from pipeline.outputs.workspace import workspace
from pipeline.storage import Store
from tests.support.disks import small_disk
from tests.support.pieces import BOTH, IDENTITY, commit, new_dataset, piece, shard_id
from tests.support.relay import Relay, relay
from tests.support.s3 import S3Server, s3_server

MOST_REQUESTS = 13  # of a commit
ONE_ATTEMPT = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}}
NAME = shard_id(0)


@dataclass(frozen=True)
class Content:
    """What a commit brings: some rows, some of them error rows, under a fingerprint."""

    fingerprint: str
    rows: int
    errors: tuple[int, ...] = ()

    @property
    def pieces(self) -> list[pa.Table]:
        return [piece(BOTH, 0, range(self.rows), self.errors, salt=self.rows)]

    def commit(self, dataset: Dataset) -> None:
        commit(dataset, self.pieces, self.rows, fingerprint=self.fingerprint)

    @property
    def keys(self) -> set[str]:
        return {f"{self.rows}/0/{i}" for i in range(self.rows) if i not in self.errors}

    @property
    def error_keys(self) -> set[str]:
        return {f"{self.rows}/0/{i}" for i in self.errors}


CLEAN, DIRTY = Content("1" * 16, 9), Content("2" * 16, 7, (2, 5))
CHANGES: dict[str, tuple[Content | None, Content]] = {
    "first": (None, DIRTY),
    "errors appear": (CLEAN, DIRTY),
    "errors disappear": (DIRTY, CLEAN),
}
# The kind of fault, and how many requests it spoils from the N-th on: one, or all until the commit gives up.
FAULTS = {
    "500 for good": ("500", None),
    "answers lost for good": ("commit_then_reset", None),
    "one answer lost": ("commit_then_reset", 1),
    "one reset": ("reset", 1),
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        server.become(patch, server.job)
        yield server


@pytest.fixture(scope="module")
def line(s3: S3Server) -> Iterator[Relay]:
    with relay(s3.endpoint_url) as found:
        yield found


def direct(s3: S3Server, name: str) -> Dataset:
    return Dataset(f"s3://labels/{name}", Store(Storage(endpoint_url=s3.endpoint_url)))


def behind(line: Relay, name: str, deadline_s: float) -> Dataset:
    """The same dataset through the line."""
    options = Storage(endpoint_url=line.url, connect_timeout_s=5.0, deadline_s=deadline_s, options=ONE_ATTEMPT)
    return Dataset(f"s3://labels/{name}", Store(options))


def assert_right(dataset: Dataset, content: Content) -> None:
    assert set(read_table(dataset, "data")["key"].to_pylist()) == content.keys
    assert set(read_table(dataset, "errors")["key"].to_pylist()) == content.error_keys


def assert_nothing_else(dataset: Dataset, content: Content) -> None:
    names = [info.url.removeprefix(dataset.url + "/") for info in dataset.store.find(dataset.url)]
    (mark,) = (name for name in names if name.startswith("_ledger/"))
    assert mark.startswith(f"_ledger/{NAME}.{content.fingerprint}.")
    errors = [f"errors/{NAME}.parquet"] if content.errors else []
    assert names == ["README.md", "_dataset.json", mark, f"data/{NAME}.parquet", *errors]


@contextmanager
def readers_look(datasets: list[Dataset], allowed: list[Content]) -> Iterator[None]:
    """Somebody lists and reads the parts all the while, and must see whole ones only."""
    over, problems, seen = threading.Event(), list[str](), set[int]()

    def look() -> None:
        while not over.is_set():
            for dataset in datasets:
                for info in dataset.store.each_match(dataset.path("data", "*.parquet")):
                    keys = set(pq.read_table(io.BytesIO(dataset.store.read(info.url)))["key"].to_pylist())
                    seen.add(len(keys))
                    if keys not in [content.keys for content in allowed]:
                        problems.append(f"{info.url}: {sorted(keys)}")

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield
        finally:
            over.set()
        looking.result()
    assert not problems
    assert seen


def play(line: Relay, s3: S3Server, name: str, change: str, fault: str, number: int) -> bool:
    """One commit whose request `number` fails. Whether there was such a request."""
    before, after = CHANGES[change]
    dataset = direct(s3, name)
    kind, times = FAULTS[fault]
    rule = line.spoil(".*", kind, times, nth=number, path=rf"{name}(/|%2F)")
    try:
        after.commit(behind(line, name, 0.3 if times is None else 10.0))
        has_failed = False
    except TransientError:
        has_failed = True
    was_spoiled = rule.matched >= number
    assert has_failed == (was_spoiled and times is None), "what passes is not noticed, what stays is an error"
    standing = dataset.standing().get(NAME)
    fingerprint = standing.fingerprint if standing else None
    if fingerprint is not None:
        assert_right(dataset, next(c for c in (before, after) if c and c.fingerprint == fingerprint))
    assert has_failed or fingerprint == after.fingerprint
    after.commit(dataset)
    assert dataset.standing()[NAME].fingerprint == after.fingerprint
    assert_right(dataset, after)
    assert_nothing_else(dataset, after)
    return was_spoiled


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        *product(CHANGES, ["500 for good", "answers lost for good"]),
        *product(["errors appear"], ["one answer lost", "one reset"]),
    ],
)
def test_any_request_of_a_commit_may_fail(line: Relay, s3: S3Server, change: str, fault: str):
    numbers = range(1, MOST_REQUESTS + 1)
    names = [f"{change}-{fault}-{number}".replace(" ", "-") for number in numbers]
    before, after = CHANGES[change]
    with ThreadPoolExecutor(MOST_REQUESTS) as pool:

        def prepare(name: str) -> None:
            direct(s3, name).claim_identity(IDENTITY)
            if before is not None:
                before.commit(direct(s3, name))

        list(pool.map(prepare, names))
        allowed = [content for content in (before, after) if content]
        with readers_look([direct(s3, name) for name in names], allowed):
            spoiled = list(pool.map(lambda case: play(line, s3, case[1], change, fault, case[0]), enumerate(names, 1)))
    requests = sum(spoiled)
    assert spoiled == [True] * requests + [False] * (MOST_REQUESTS - requests)
    assert 8 <= requests < MOST_REQUESTS, "each request of a commit has failed, and one commit had no fault"
    assert "Uploads" not in s3.client(s3.owner).list_multipart_uploads(Bucket="labels")


@pytest.mark.parametrize("kind", ["commit_then_reset", "500"])
def test_a_claim_survives_any_lost_answer(line: Relay, s3: S3Server, kind: str):
    """A refusal may be the echo of our own write: what stands decides."""
    for number in count(1):
        dataset = behind(line, f"claim-{kind}-{number}", 10.0)
        rule = line.spoil(".*", kind, nth=number, path=f"claim-{kind}-{number}(/|%2F)")
        dataset.claim_identity(IDENTITY)
        dataset.confirm_identity(IDENTITY)
        if rule.times:
            break
    assert number > 5


def test_no_room_for_a_temporary_folder_is_a_full_disk(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StoreFull, match=r"cannot make a folder in .*No space.*Free space and run"), workspace():
        pass


def test_a_full_temporary_folder_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is committed stays, and with room again the same commit goes through."""
    dataset = new_dataset(tmp_path / "labels")
    CLEAN.commit(dataset)
    before = dataset.standing()
    rows = piece(BOTH, 0, range(300_000))
    with small_disk(tmp_path) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(
            StoreFull, match=f"cannot write a temporary file below {disk}: .*No space.*Free space and run"
        ):
            commit(dataset, [rows], rows.num_rows, fingerprint="3" * 16)
        assert list(disk.iterdir()) == []
        assert dataset.standing() == before
        DIRTY.commit(dataset)
    assert_right(dataset, DIRTY)
