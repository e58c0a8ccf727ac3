"""Which shards the receipts have completed."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.outputs.progress import Abandon, Commit, Decision, Progress, Receipt


def receipt(shard: int, indices: Iterable[int], piece: object = None, end: int | None = None) -> Receipt:
    return Receipt(shard, np.array(list(indices), np.int64), 0, piece, end)


def abandoned(shard: int, reason: str = "the store is down") -> Receipt:
    return Receipt(shard, np.empty(0, np.int64), 0, None, abandoned=reason)


def feed(progress: Progress, receipts: Iterable[Receipt]) -> list[Decision]:
    return [decision for one in receipts for decision in progress.on_receipt(one)]


@st.composite
def readings(draw: st.DrawFn) -> tuple[list[int], list[Receipt]]:
    """The sizes of some shards, and receipts of overlapping pieces of them, some twice, in any order."""
    sizes = draw(st.lists(st.integers(0, 200), min_size=1, max_size=4))
    receipts = []
    for shard, size in enumerate(sizes):
        for reading in range(draw(st.integers(1, 2))):  # a task that runs again may cut its blocks elsewhere
            cuts = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
            with_end = draw(st.integers(0, len(cuts)))
            for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, size], strict=True)):
                overlap = range(max(start - draw(st.integers(0, 3)), 0), stop)
                order = draw(st.permutations(overlap)) if size < 20 else overlap
                end = size if number == with_end else None
                receipts.append(receipt(shard, order, (shard, reading, number), end))
    again = draw(st.lists(st.sampled_from(receipts), max_size=5))
    return sizes, draw(st.permutations(receipts + again))


@given(readings())
def test_each_shard_is_committed_once_and_exactly_when_it_is_complete(case: tuple[list[int], list[Receipt]]):
    sizes, receipts = case
    progress = Progress(len(sizes))
    seen: list[set[int]] = [set() for _ in sizes]
    ended = [False] * len(sizes)
    committed: dict[int, Commit] = {}
    for one in receipts:
        seen[one.shard] |= set(one.indices.tolist())
        ended[one.shard] |= one.end is not None
        is_complete = ended[one.shard] and len(seen[one.shard]) == sizes[one.shard]
        decisions = progress.on_receipt(one)
        if is_complete and one.shard not in committed:
            (decision,) = decisions
            assert isinstance(decision, Commit)
            committed[one.shard] = decision
            assert decision.num_rows == sizes[one.shard]
        else:
            assert decisions == []
    assert committed.keys() == set(range(len(sizes)))
    held = {one.piece: set(one.indices.tolist()) for one in receipts}
    for shard, decision in committed.items():
        assert set().union(*(held[piece] for piece in decision.pieces)) == set(range(sizes[shard]))
        assert len(decision.pieces) == len(set(decision.pieces)), "the same block twice brings nothing"


def test_a_shard_without_samples_is_complete_with_its_end():
    assert Progress(1).on_receipt(receipt(0, [], end=0)) == [Commit(0, 0, ())]


def test_an_abandoned_shard_stays_open_whatever_comes_afterwards():
    progress = Progress(2)
    assert progress.on_receipt(receipt(0, [0, 1])) == []
    assert progress.on_receipt(abandoned(0)) == [Abandon(0, "the store is down")]
    assert feed(progress, [receipt(0, [0, 1], end=2), abandoned(0)]) == []
    assert progress.unsettled() == [1]


def test_a_shard_is_abandoned_when_two_readings_end_differently():
    progress = Progress(1)
    (decision,) = feed(progress, [receipt(0, [0], end=3), receipt(0, [1, 2], end=4), receipt(0, [3])])
    assert isinstance(decision, Abandon)
    assert "3 and 4" in decision.reason


@pytest.mark.parametrize("late", [True, False])
def test_a_shard_is_abandoned_when_there_are_rows_past_its_end(late: bool):
    receipts = [receipt(0, range(3), end=3), receipt(0, [3])]
    if late:  # the committed rows are complete all the same
        assert feed(Progress(1), receipts) == [Commit(0, 3, (None,))]
    else:
        (decision,) = feed(Progress(1), reversed(receipts))
        assert isinstance(decision, Abandon)
        assert "past its end at 3" in decision.reason


def test_receipts_of_a_committed_shard_are_ignored():
    progress = Progress(1)
    assert feed(progress, [receipt(0, [0], "a", end=1)]) == [Commit(0, 1, ("a",))]
    assert feed(progress, [receipt(0, [0], "b", end=1), abandoned(0)]) == []
    assert progress.unsettled() == [0]
    assert progress.on_committed(0) == []
    assert progress.unsettled() == []


# --- A shard that waits for another ----------------------------------------------------------------------------------


def done(shard: int) -> Receipt:
    return receipt(shard, [0], end=1)


def test_a_shard_is_held_until_the_one_before_it_is_committed():
    progress = Progress(3, after={1: 0, 2: 0})
    assert feed(progress, [done(1), done(2)]) == []
    assert feed(progress, [done(0)]) == [Commit(0, 1, (None,))]
    assert feed(progress, [done(1)]) == [], "a held shard is complete; more receipts change nothing"
    assert progress.on_committed(0) == [Commit(1, 1, (None,)), Commit(2, 1, (None,))]
    assert feed(progress, [done(1)]) == []
    assert progress.unsettled() == [1, 2]


def test_a_shard_whose_predecessor_is_committed_already_is_not_held():
    progress = Progress(2, after={1: 0})
    feed(progress, [done(0)])
    progress.on_committed(0)
    assert feed(progress, [done(1)]) == [Commit(1, 1, (None,))]


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 2, 1], [2]])
def test_a_failed_commit_gives_up_the_whole_chain_behind_it(order: list[int]):
    progress = Progress(4, after={1: 0, 2: 1, 3: 2})
    feed(progress, [done(0), *(done(shard) for shard in order)])
    decisions = progress.on_failed(0)
    assert [type(decision) for decision in decisions] == [Abandon] * 3
    assert [decision.shard for decision in decisions] == [1, 2, 3]
    assert feed(progress, [done(1), done(2), done(3)]) == []
    assert progress.unsettled() == []


def test_an_abandoned_predecessor_gives_up_its_dependents_too():
    progress = Progress(3, after={1: 0, 2: 1})
    feed(progress, [done(2)])
    assert [d.shard for d in feed(progress, [abandoned(0)])] == [0, 1, 2]
    assert progress.unsettled() == []


@given(st.integers(0, 2**32))
def test_no_shard_is_committed_before_the_one_it_waits_for(seed: int):
    choice = random.Random(seed)
    size = choice.randrange(1, 12)
    after = {shard: choice.randrange(shard) for shard in range(1, size) if choice.random() < 0.6}
    progress = Progress(size, after)
    todo: list[tuple[str, int]] = [("receipt", shard) for shard in range(size)]
    committed, given_up, started = set[int](), set[int](), set[int]()
    while todo:
        what, shard = todo.pop(choice.randrange(len(todo)))
        if what == "commit":
            failed = choice.random() < 0.2
            (given_up if failed else committed).add(shard)
            decisions = progress.on_failed(shard) if failed else progress.on_committed(shard)
        else:
            decisions = progress.on_receipt(abandoned(shard) if choice.random() < 0.2 else done(shard))
        for decision in decisions:
            if isinstance(decision, Abandon):
                given_up.add(decision.shard)
                assert decision.shard not in started
            else:
                assert decision.shard not in started
                assert after.get(decision.shard) in committed | {None}
                started.add(decision.shard)
                todo.append(("commit", decision.shard))
    assert committed | given_up == set(range(size))
    assert not committed & given_up
    assert progress.unsettled() == []


# --- Size ------------------------------------------------------------------------------------------------------------


class Piece:
    """Stands for a block in the object store, which a reference keeps alive."""


@pytest.mark.parametrize("last", [done(0), abandoned(0)], ids=["committed", "abandoned"])
def test_a_decided_shard_keeps_no_piece_alive(last: Receipt):
    progress, piece = Progress(1), Piece()
    gone = weakref.ref(piece)
    assert progress.on_receipt(receipt(0, [], end=2)) == []
    assert progress.on_receipt(receipt(0, [1], piece)) == []
    del piece
    assert gone() is not None
    assert len(progress.on_receipt(replace(last, end=None))) == 1
    assert progress.on_receipt(receipt(0, [0], Piece())) == []
    assert gone() is None


def test_a_large_shard_is_fast():
    size, rows = 1_000_000, 128
    blocks = [np.arange(start, min(start + rows, size)) for start in range(0, size, rows)]
    random.Random(0).shuffle(blocks)
    progress = Progress(2)
    started = time.process_time()
    decisions = progress.on_receipt(receipt(0, [], end=size))
    for number, block in enumerate(blocks):
        decisions += progress.on_receipt(Receipt(0, block, 0, number))
    (decision,) = decisions
    assert isinstance(decision, Commit)
    assert sorted(decision.pieces) == list(range(len(blocks)))
    assert time.process_time() - started < 5


def test_a_receipt_is_news_once():
    """What counts error rows must not count them again when Ray does a block twice."""
    progress = Progress(2)
    first = Receipt(0, np.arange(3), 1, "a")
    assert progress.is_news(first)
    progress.on_receipt(first)
    assert not progress.is_news(first)
    assert not progress.is_news(Receipt(0, np.arange(2), 0, "b"))
    assert progress.is_news(Receipt(0, np.arange(2, 200), 0, "c"))
    assert progress.is_news(Receipt(1, np.arange(3), 0, "a"))
    assert not progress.is_news(Receipt(1, np.arange(0), 0, "d", end=0)), "a marker alone brings no rows"
    progress.on_receipt(Receipt(0, np.arange(3), 0, "e", end=3))
    assert not progress.is_news(Receipt(0, np.arange(9), 0, "f")), "the shard is decided"
