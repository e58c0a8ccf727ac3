"""Explore every interleaving of a few actors, whose steps are generators, over a store that is one hashable value.

An actor may die after any step: every prefix of a history is a history too, so what holds in every state holds after
every death. An actor's memory are the answers that it was sent; its next step is found by replaying them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pipeline.errors import PipelineError

Store = Any
Steps = Generator[Any, Any, Any]
Rule = Callable[[Any, set[Any]], Steps]  # a step, and a memory of its own, to the steps in its place

DIED = object()  # the answer that ends an actor: its step raised


class World(Protocol):
    def perform(self, store: Store, actor: str, step: Any, late: bool = False) -> tuple[Store, Any]:
        """The store after a step, and the step's answer or DIED. A `late` write is told from the one before it."""

    def is_write(self, step: Any) -> bool: ...

    def events(self, store: Store) -> Iterable[Store]:
        """What may happen to the store from outside."""

    def check(self, before: Store, after: Store) -> None:
        """Raise Wrong if `after` must not be reached from `before`."""

    def check_end(self, store: Store) -> None:
        """Raise Wrong if all actors have ended, none of them by dying, and this must not be what they leave."""


class Wrong(AssertionError):
    """A state that must not be, with the history that leads there."""


class State(NamedTuple):
    """`late` is a write whose answer was lost: its actor may repeat it or die, and it may land at any moment."""

    store: Store
    answers: tuple[tuple[Any, ...], ...]
    late: tuple[str, Any] | None = None
    may_lose: bool = False


@dataclass
class Explorer:
    world: World
    actors: Mapping[str, Callable[[], Steps]]
    seen: dict[State, int] = field(default_factory=dict)
    _next: dict[tuple[str, tuple[Any, ...]], Any] = field(default_factory=dict)

    def explore(self, store: Store, may_lose: bool = False) -> int:
        """The number of histories from this store, each prefix counted; with `may_lose`, one write of each may be
        late. Raises Wrong."""
        return self._histories(State(store, ((),) * len(self.actors), None, may_lose), [])

    def _histories(self, state: State, path: list[tuple[Any, ...]]) -> int:
        known = self.seen.get(state)
        if known is not None:
            return known
        count = 1
        for what, after in self._successors(state):
            path.append(what)
            try:
                self.world.check(state.store, after.store)
            except Wrong as wrong:
                told = "\n  ".join(" ".join(map(str, parts)) for parts in path)
                raise Wrong(f"{wrong} after:\n  {told}") from None
            count += self._histories(after, path)
            path.pop()
        if count == 1:
            self.world.check_end(state.store)
        self.seen[state] = count
        return count

    def _successors(self, state: State) -> Iterator[tuple[tuple[Any, ...], State]]:
        """Each with what has happened, in parts: they become text only where something is wrong."""
        for store in self.world.events(state.store):
            yield ("the source changes",), State(store, state.answers, state.late, state.may_lose)
        if state.late is not None:
            actor, step = state.late
            store, _ = self.world.perform(state.store, actor, step, late=True)
            yield (actor, step, "lands late"), State(store, state.answers, None, False)
        for number, actor in enumerate(self.actors):
            step = self._step(actor, state.answers[number])
            if step is None:
                continue
            store, answer = self.world.perform(state.store, actor, step)
            mine = (*state.answers[number], answer)
            answers = (*state.answers[:number], mine, *state.answers[number + 1 :])
            yield (actor, step, "->", answer), State(store, answers, state.late, state.may_lose)
            if state.may_lose and self.world.is_write(step):
                yield (actor, step, "gets no answer"), State(state.store, state.answers, (actor, step), False)

    def _step(self, actor: str, answers: tuple[Any, ...]) -> Any:
        """What the actor does next; None if it has ended."""
        key = (actor, answers)
        if key not in self._next:
            self._next[key] = None if DIED in answers else _replay(self.actors[actor](), answers)
        return self._next[key]


def _replay(steps: Steps, answers: tuple[Any, ...]) -> Any:
    try:
        step = next(steps)
        for answer in answers:
            step = steps.send(answer)
    except (StopIteration, PipelineError):
        return None
    return step


def run_alone(world: World, store: Store, actor: str, steps: Steps) -> Store:
    """The store after one actor that nobody disturbs."""
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except (StopIteration, PipelineError):
            return store
        store, answer = world.perform(store, actor, step)
        if answer is DIED:
            return store


def rewritten(rule: Rule, steps: Steps) -> Steps:
    """The steps, each replaced by those that `rule` makes of it; its second argument is its memory."""
    memory, answer = set[Any](), None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield from rule(step, memory)


def as_it_is(step: Any, memory: set[Any]) -> Steps:
    return (yield step)
