"""All histories of two first runs with two models in one dataset: of their claims, and of the first commit of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from pipeline.errors import ModelMismatch
from pipeline.outputs.ledger import (
    Check,
    Claim,
    Confirm,
    Delete,
    Disown,
    Identify,
    Look,
    Owner,
    Put,
    Standing,
    claim_steps,
    commit_steps,
)
from tests.support.histories import DIED, Explorer, Rule, Steps, Wrong, as_it_is, rewritten, run_alone


@dataclass(frozen=True)
class Owned:
    """A dataset's claim, and its parts and marks by shard, each with the model that it is of."""

    claim: str | None = None
    data: frozenset[tuple[str, str]] = frozenset()
    marks: frozenset[tuple[str, str]] = frozenset()


REFUSED = ModelMismatch("claimed by another model")


class OwnershipWorld:
    """Runs that have a model and one shard each."""

    def __init__(self, runs: dict[str, tuple[str, str]], may_lose: bool) -> None:
        self._runs, self._may_lose = runs, may_lose
        self.owners: set[str] = set()
        self._recovered: set[Owned] = set()

    def perform(self, store: Owned, actor: str, step: Any, late: bool = False) -> tuple[Owned, Any]:  # noqa: PLR0911
        shard, model = self._runs[actor.removesuffix(" again")]
        match step:
            case Identify():
                return store, store.claim
            case Owner():
                return store, min((model for _, model in store.marks or store.data), default=None)
            case Claim(identity):
                return replace(store, claim=store.claim or identity), None
            case Disown():
                return replace(store, claim=None), None
            case Look():
                return store, Standing(part=dict(store.data).get(shard))
            case Check():
                return store, None if store.claim == model else DIED
            case Confirm():
                return store, None if store.claim == model else REFUSED
            case Put("data", _):
                return replace(store, data=frozenset((dict(store.data) | {shard: model}).items())), "a version"
            case Put("_ledger", _):
                return replace(store, marks=store.marks | {(shard, model)}), None
            case Delete("data", _):
                return replace(store, data=frozenset(part for part in store.data if part[0] != shard)), None
            case Delete("errors", _):
                return store, None
        raise AssertionError(step)

    def is_write(self, step: Any) -> bool:
        return isinstance(step, Put | Delete | Claim | Disown)

    def events(self, store: Owned) -> Iterable[Owned]:
        return ()

    def check(self, before: Owned, after: Owned) -> None:
        models = {model for _, model in after.marks}
        if len(models) > 1:
            raise Wrong(f"two models have committed: {after}")
        self.owners |= models
        if after not in self._recovered:
            self._recovered.add(after)
            for actor, (shard, model) in self._runs.items():
                self.check(after, run_alone(self, after, f"{actor} again", run_of(model, shard)))

    def check_end(self, store: Owned) -> None:
        # A part that lands after its writer has died or withdrawn it has no mark.
        if len({model for _, model in store.data}) > 1 and not self._may_lose:
            raise Wrong(f"parts of two models: {store}")


def run_of(model: str, shard: str, rule: Rule = as_it_is) -> Steps:
    if (yield from claim_steps(model, str)):
        yield from rewritten(rule, commit_steps(shard, "source", False, attempts=1))


def explore_runs(shards: str, claim: str | None, may_lose: bool, rule: Rule = as_it_is) -> tuple[int, set[str]]:
    """The number of histories of a run of model a and one of model b, and the models that can win."""
    runs = {"A": (shards[0], "a"), "B": (shards[1], "b")}
    world = OwnershipWorld(runs, may_lose)
    actors = {name: partial(run_of, model, shard, rule) for name, (shard, model) in runs.items()}
    return Explorer(world, actors).explore(Owned(claim), may_lose), world.owners


@pytest.mark.parametrize("may_lose", [False, True], ids=["", "a late write"])
@pytest.mark.parametrize("shards", ["ss", "st"], ids=["the same shard", "two shards"])
@pytest.mark.parametrize("claim", [None, "a", "of a third model"])
def test_every_history_of_two_models_in_an_empty_dataset(shards: str, claim: str | None, may_lose: bool):
    histories, winners = explore_runs(shards, claim, may_lose)
    assert histories >= 200_000
    assert winners == {"a", "b"}


def without_confirming(step: Any, memory: set[Any]) -> Steps:
    return None if isinstance(step, Confirm) else (yield step)


def test_a_commit_that_does_not_confirm_the_claim_is_found():
    with pytest.raises(Wrong, match="two models have committed"):
        explore_runs("st", "a", False, without_confirming)
