"""Which shards of a plan the receipts have completed, as pure functions. `driver.py` does what is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a finished block says about one shard: the indices in it, and the shard's end if the block has it.

    `piece` stands for where the block lies; the ledger only hands it on.
    """

    shard: int
    indices: np.ndarray  # int64 (rows,), error rows included
    errors: int
    piece: Any
    end: int | None = None
    abandoned: str | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """Decision: all rows of the shard are there; merge `pieces` and commit."""

    shard: int
    num_rows: int
    pieces: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Decision: the shard stays open in this run, for this reason."""

    shard: int
    reason: str


Decision = Commit | Abandon


@dataclass(slots=True)
class _Open:
    """A shard under way: which indices have arrived, in which pieces."""

    seen: np.ndarray = field(default_factory=lambda: np.zeros(64, bool))
    pieces: list[Any] = field(default_factory=list)
    end: int | None = None


class Progress:
    """Which shards of the plan are complete, given receipts in any order and any number of times.

    `after[b] = a` holds the commit of shard b back until shard a is committed; if a fails, b is abandoned.
    """

    def __init__(self, num_shards: int, after: Mapping[int, int] | None = None) -> None:
        self.after = dict(after or {})
        self._open: dict[int, _Open] = {}
        self._settled = np.zeros(num_shards, bool)  # committed, failed or abandoned
        self._decided = np.zeros(num_shards, bool)  # handed out as a decision
        self._held: dict[int, Commit] = {}

    def is_news(self, receipt: Receipt) -> bool:
        """Whether it holds rows that no earlier receipt had."""
        shard = self._open.get(receipt.shard)
        if self._decided[receipt.shard] or receipt.shard in self._held or not len(receipt.indices):
            return False
        return shard is None or receipt.indices.max() >= len(shard.seen) or not shard.seen[receipt.indices].all()

    def on_receipt(self, receipt: Receipt) -> list[Decision]:
        """The decisions that this receipt makes possible. Receipts of decided shards are ignored."""
        if self._decided[receipt.shard] or receipt.shard in self._held:
            return []
        if receipt.abandoned is not None:
            return self._abandon(receipt.shard, receipt.abandoned)
        shard = self._open.setdefault(receipt.shard, _Open())
        if receipt.end is not None and shard.end not in (None, receipt.end):
            return self._abandon(
                receipt.shard, f"two readings of it found {shard.end} and {receipt.end} samples: it changed meanwhile"
            )
        if receipt.end is not None:
            shard.end = receipt.end
        if len(receipt.indices):
            _add(shard, receipt)
        if shard.end is None or not shard.seen[: shard.end].all() or len(shard.seen) < shard.end:
            return []
        if shard.seen[shard.end :].any():
            return self._abandon(receipt.shard, f"there are rows past its end at {shard.end}: it changed meanwhile")
        return self._complete(Commit(receipt.shard, shard.end, tuple(shard.pieces)))

    def on_committed(self, shard: int) -> list[Decision]:
        """The decisions that this commit sets free."""
        self._settled[shard] = True
        return [self._release(held) for held in list(self._held) if self.after.get(held) == shard]

    def on_failed(self, shard: int) -> list[Decision]:
        """The decisions that follow from a shard that won't be committed in this run."""
        self._settled[shard] = True
        return self._abandon_dependents(shard)

    def has_all(self) -> bool:
        """Whether no shard has rows to come."""
        return int(np.count_nonzero(self._decided)) + len(self._held) == len(self._decided)

    def unsettled(self) -> list[int]:
        """The shards that are neither committed nor given up."""
        return [int(i) for i in np.flatnonzero(~self._settled)]

    def _complete(self, commit: Commit) -> list[Decision]:
        del self._open[commit.shard]
        first = self.after.get(commit.shard)
        if first is not None and not self._settled[first]:  # had it failed, this shard would be abandoned by now
            self._held[commit.shard] = commit
            return []
        self._decided[commit.shard] = True
        return [commit]

    def _release(self, shard: int) -> Decision:
        self._decided[shard] = True
        return self._held.pop(shard)

    def _abandon(self, shard: int, reason: str) -> list[Decision]:
        self._open.pop(shard, None)
        self._held.pop(shard, None)
        self._decided[shard] = self._settled[shard] = True
        return [Abandon(shard, reason), *self._abandon_dependents(shard)]

    def _abandon_dependents(self, shard: int) -> list[Decision]:
        decisions: list[Decision] = []
        for dependent, first in self.after.items():
            if first == shard and not self._decided[dependent]:
                reason = "the group that its files come from could not be committed first"
                decisions.extend(self._abandon(dependent, reason))
        return decisions


def _add(shard: _Open, receipt: Receipt) -> None:
    top = int(receipt.indices.max()) + 1
    if top > len(shard.seen):
        grown = np.zeros(max(top, 2 * len(shard.seen)), bool)
        grown[: len(shard.seen)] = shard.seen
        shard.seen = grown
    if not shard.seen[receipt.indices].all():  # a block that came twice brings nothing
        shard.seen[receipt.indices] = True
        shard.pieces.append(receipt.piece)
