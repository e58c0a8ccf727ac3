"""Commits on a real S3 server, by a job that may read and write but not administer: versions are ETags there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.config import Storage
from pipeline.errors import ModelMismatch, OutcomeUnknown
from pipeline.outputs.dataset import Dataset, make_identity, read_table
from pipeline.storage import Store
from tests.support.pieces import BOTH, IDENTITY, commit, piece, shard_id
from tests.support.s3 import S3Server, s3_server

OTHER = make_identity({"name": "resnet50"}, "f" * 16, None, 2)
NEW = "2" * 16


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def dataset(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Dataset:
    server.become(monkeypatch, server.job)
    return Dataset(f"s3://labels/{request.node.name}/", Store(Storage(endpoint_url=server.endpoint_url, deadline_s=1)))


def keys(server: S3Server, dataset: Dataset) -> dict[str, str]:
    """The names in the dataset and their ETags."""
    prefix = dataset.url.removeprefix("s3://labels/")
    found = server.client(server.owner).list_objects_v2(Bucket="labels", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix): item["ETag"].strip('"') for item in found}


def test_a_shard_is_committed_found_replaced_and_retired(server: S3Server, dataset: Dataset):
    assert dataset.standing() == {}
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, range(9), errors=[4])], 9)
    standing = dataset.standing()
    assert standing == {shard_id(0): dataset.standing_of(shard_id(0))}
    assert standing[shard_id(0)].fingerprint == "1" * 16
    before = keys(server, dataset)
    assert standing[shard_id(0)].part == before[f"data/{shard_id(0)}.parquet"]
    commit(dataset, [piece(BOTH, 0, range(9), errors=[4])], 9)
    assert keys(server, dataset) == before
    commit(dataset, [piece(BOTH, 0, range(7), salt=1)], 7, fingerprint=NEW)
    assert dataset.standing()[shard_id(0)].fingerprint == NEW
    assert len(keys(server, dataset)) == len(before) - 1, "one mark, and the errors part is gone"
    assert read_table(dataset, "data")["index"].to_pylist() == list(range(7))
    assert read_table(dataset, "errors").num_rows == 0
    commit(dataset, [piece(BOTH, 1, range(2))], 2, number=1, retires=(shard_id(0),))
    assert dataset.standing().keys() == {shard_id(1)}


def test_a_redo_replaces_a_commit_also_by_the_very_same_bytes(server: S3Server, dataset: Dataset):
    """Here, unlike on a disk, the same rows have the same version."""
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, range(9), errors=[4])], 9)
    before, mark = keys(server, dataset), dataset.standing_of(shard_id(0)).valid_mark
    assert mark is not None
    commit(dataset, [piece(BOTH, 0, range(9), errors=[4])], 9, replaces=mark.commit)
    assert keys(server, dataset) == before
    commit(dataset, [piece(BOTH, 0, range(9))], 9, replaces=mark.commit)
    assert len(keys(server, dataset)) == len(before) - 1
    redone = dataset.standing_of(shard_id(0)).valid_mark
    assert redone is not None
    commit(dataset, [piece(BOTH, 0, range(9), errors=[4])], 9, replaces=mark.commit)
    assert dataset.standing_of(shard_id(0)).valid_mark == redone


def test_an_empty_dataset_changes_hands_and_one_with_rows_does_not(dataset: Dataset):
    dataset.claim_identity(OTHER)
    dataset.claim_identity(IDENTITY)
    with pytest.raises(ModelMismatch):
        commit(dataset, [piece(BOTH, 0, [0])], 1, identity=OTHER)
    commit(dataset, [piece(BOTH, 0, [0])], 1)
    with pytest.raises(ModelMismatch, match="resnet50"):
        dataset.claim_identity(OTHER)
    assert dataset.identity() == IDENTITY


def test_a_part_that_others_have_overwritten_is_done_again(server: S3Server, dataset: Dataset):
    dataset.claim_identity(IDENTITY)
    commit(dataset, [piece(BOTH, 0, range(3))], 3)
    key = f"{dataset.url.removeprefix('s3://labels/')}data/{shard_id(0)}.parquet"
    server.client(server.owner).put_object(Bucket="labels", Key=key, Body=b"something else")
    assert dataset.standing()[shard_id(0)].fingerprint is None
    commit(dataset, [piece(BOTH, 0, range(3))], 3)
    assert dataset.standing()[shard_id(0)].fingerprint == "1" * 16


def test_a_store_that_is_down_leaves_the_shard_open(server: S3Server, dataset: Dataset, monkeypatch: Any):
    dataset.claim_identity(IDENTITY)
    put = Store.put

    def put_and_go_down(store: Store, url: str, data: Any) -> str:
        if "/data/" in url:
            server.kill()
        return put(store, url, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put_and_go_down)
        with pytest.raises(OutcomeUnknown):
            commit(dataset, [piece(BOTH, 0, range(3))], 3)
    server.start()
    assert dataset.standing().get(shard_id(0)) is None
    commit(dataset, [piece(BOTH, 0, range(3))], 3)
    assert dataset.standing()[shard_id(0)].fingerprint == "1" * 16
