"""A plan over very many shards keeps little of each, and asks the store for nothing twice."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.million import CONFIG, Listings, listed_from, make_listings
from pipeline.config import make_config
from pipeline.outputs.dataset import Dataset
from pipeline.planning import make_plan
from pipeline.storage import Store

SHARDS, DONE = 20_000, 19_980


@pytest.fixture(scope="module")
def listings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listings")
    make_listings(folder, SHARDS, DONE)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many pages of each listing were asked for."""
    count: Counter[str] = Counter()
    plain = Listings._call_s3

    async def counted(self: Listings, method: str, Prefix: str, **query: Any) -> dict[str, Any]:
        count[Prefix.split("/")[1] or "raw"] += 1
        return await plain(self, method, Prefix=Prefix, **query)

    monkeypatch.setattr(Listings, "_call_s3", counted)
    return count


def test_a_plan_keeps_little_of_what_is_done(listings: Path, asked: Counter[str]):
    """Some 650 bytes of each shard, of which 200 are its id and its URL. A million take less than 1 GB."""
    with listed_from(listings):
        make_plan(make_config(CONFIG))  # imports what it needs
        asked.clear()
        tracemalloc.start()
        plan = make_plan(make_config(CONFIG))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (len(plan.tasks), len(plan.done), plan.gone, plan.changed) == (SHARDS - DONE, DONE, [], [])
    assert peak / SHARDS < 800
    assert asked == {"raw": 20, "_ledger": 20, "data": 20, "errors": 1}, "each listed once, 1,000 keys a page"


def test_whose_a_dataset_is_takes_one_page(listings: Path, asked: Counter[str], monkeypatch: pytest.MonkeyPatch):
    """A run asks for it before it plans and before it commits."""
    with listed_from(listings):
        dataset = Dataset("s3://labels/million", Store())
        monkeypatch.setattr(Dataset, "read_mark", lambda *_: {"model_fingerprint": "ours"})
        assert dataset.owner() == "ours"
    assert asked == {"_ledger": 1}
