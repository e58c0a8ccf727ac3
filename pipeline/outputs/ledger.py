"""The ledger, as pure functions: which marks are to be believed, and what a commit does in which order. Nothing here
reads or writes; `commit.py` and `dataset.py` do what is decided here.

The order of writes in a commit. Each line must be safe to die after, and to be overtaken by another committer:

    1. stop if a valid mark for this fingerprint stands already; a commit that is to replace one names it, and stops if
       another one than that stands
    2. the source MUST still be the planned one, and the dataset's model ours
    3. a vanished group whose files this one takes MUST be gone before this one's part appears
    4. the shard's old marks MUST be gone before anything that they vouch for is replaced
    5. the errors part is put (or the old one deleted) before the part
    6. the part MUST stand, and the dataset's model still be ours, before the mark is put
    7. the mark's name carries the source's fingerprint and a hash of the versions of the part and the errors part
    8. a commit counts only if its mark is believed afterwards: two at once may each leave one, and then begin again

A mark is believed only if it is its shard's single one and the versions it vouches for are those that stand there.
Whatever else is found is done again: same rows, same names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pipeline.config import digest
from pipeline.errors import TransientError

T = TypeVar("T")

ATTEMPTS = 4  # of a commit that a rival undoes
BACK_OFF_S = 0.25


@dataclass(frozen=True, slots=True)
class Mark:
    """A shard's ledger entry; its file name says all that a plan needs."""

    shard_id: str
    fingerprint: str
    commit: str

    @property
    def name(self) -> str:
        return f"{self.shard_id}.{self.fingerprint}.{self.commit}.json"

    @staticmethod
    def parse(name: str) -> Mark | None:
        """The mark of this file name; None for a file that is no mark."""
        parts = name.rsplit(".", 3)
        return Mark(*parts[:3]) if len(parts) == 4 and parts[3] == "json" else None


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands in a dataset for one shard: its marks, and the versions of its part and errors part."""

    marks: tuple[Mark, ...] = ()
    part: str | None = None
    errors: str | None = None

    @property
    def valid_mark(self) -> Mark | None:
        """The mark that is to be believed, if there is one."""
        if len(self.marks) != 1 or self.part is None:
            return None
        return self.marks[0] if self.marks[0].commit == commit_hash(self.part, self.errors) else None

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the source that this shard is committed for."""
        mark = self.valid_mark
        return mark.fingerprint if mark else None


NOTHING = Standing()


def commit_hash(part: str, errors: str | None) -> str:
    """What a mark vouches for: the versions of a part and of an errors part, or that there is none."""
    return digest([part, errors])


def marks_by_shard(marks: Iterable[Mark]) -> dict[str, str]:
    """Shard id to `<fingerprint>.<commit>`, several joined by `/`."""
    found: dict[str, str] = {}
    for mark in marks:
        text = f"{mark.fingerprint}.{mark.commit}"
        others = found.get(mark.shard_id)
        found[mark.shard_id] = text if others is None else f"{others}/{text}"
    return found


class Standings(Mapping[str, Standing]):
    """What stands, by shard id. There may be millions: three dictionaries of strings, and a Standing when it is asked
    for."""

    def __init__(self, marks: Mapping[str, str], parts: Mapping[str, str], errors: Mapping[str, str]) -> None:
        """`marks`: see `marks_by_shard`; `parts`, `errors`: shard id to version."""
        self._marks, self._parts, self._errors = marks, parts, errors

    def __getitem__(self, shard_id: str) -> Standing:
        found = self._marks.get(shard_id, "")
        # In an order, since listings have none: what is shown here is compared with what stands later.
        marks = tuple(Mark(shard_id, *mark.split(".")) for mark in sorted(found.split("/"))) if found else ()
        standing = Standing(marks, self._parts.get(shard_id), self._errors.get(shard_id))
        if standing == NOTHING:
            raise KeyError(shard_id)
        return standing

    def __iter__(self) -> Iterator[str]:
        yield from self._parts
        yield from (name for name in self._marks if name not in self._parts)
        yield from (name for name in self._errors if name not in self._parts and name not in self._marks)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- The commit, step by step ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """Answer: the Standing of this shard, from listings."""

    shard_id: str


@dataclass(frozen=True, slots=True)
class Check:
    """Raise if the source is no longer the planned one or the dataset is not our model's. Answer: nothing."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Answer: None, or the error that says that another model has claimed the dataset meanwhile."""


@dataclass(frozen=True, slots=True)
class Put:
    """Write a file of `data`, `errors` or `_ledger` for this shard. Answer: the version written."""

    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a file that may be gone already. Answer: nothing."""

    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Let a rival have its turn, for a time by chance of up to so many seconds. Answer: nothing."""

    seconds: float


Step = Look | Check | Confirm | Put | Delete | Wait
Steps = Generator[Any, Any, T]


def run_steps(steps: Steps[T], perform: Callable[[Any], Any]) -> T:
    """Perform each step and send its answer back; the steps' own return value."""
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return cast(T, end.value)
        answer = perform(step)


def commit_steps(
    shard_id: str,
    fingerprint: str,
    has_errors: bool,
    retires: Collection[str] = (),
    replaces: str | None = None,
    attempts: int = ATTEMPTS,
) -> Steps[bool]:
    """The steps of a commit; each is sent its answer. Returns False if the shard stood committed already.

    `replaces` is the `commit` of the mark that a redo was planned to replace: with any other one the shard counts as
    committed, since a rival has redone it meanwhile. Raises TransientError where rivals undo each other's commits.
    """
    for attempt in range(attempts):
        if attempt:
            yield Wait(BACK_OFF_S * 2**attempt)
        is_written = yield from _attempt_steps(shard_id, fingerprint, has_errors, retires, replaces)
        if not is_written:
            return False
        standing: Standing = yield Look(shard_id)
        if standing.fingerprint == fingerprint:
            return True
    raise TransientError(f"another run commits {shard_id} at the same time. Run again.")


def _attempt_steps(
    shard_id: str, fingerprint: str, has_errors: bool, retires: Collection[str], replaces: str | None
) -> Steps[bool]:
    standing: Standing = yield Look(shard_id)
    mark = standing.valid_mark
    is_done = mark is not None and mark.fingerprint == fingerprint and mark.commit != replaces
    if is_done and not retires:
        return False
    yield Check()
    for vanished in retires:
        yield from retire_steps(vanished)
    if is_done:
        return False
    for mark in standing.marks:
        yield Delete("_ledger", mark.name)
    name = f"{shard_id}.parquet"
    errors: str | None = None
    if has_errors:
        errors = yield Put("errors", name)
    else:
        yield Delete("errors", name)
    part: str = yield Put("data", name)
    refusal: Exception | None = yield Confirm()
    if refusal is not None:
        # Only a dataset without a part can be claimed by another model, so a part that stood before is no trespasser.
        if standing.part is None:
            yield Delete("data", name)
            yield Delete("errors", name)
        raise refusal
    yield Put("_ledger", Mark(shard_id, fingerprint, commit_hash(part, errors)).name)
    return True


def retire_steps(shard_id: str, shown: Standing | None = None) -> Steps[bool]:
    """The steps that take a shard out of the dataset: its marks first, so that nothing vouches for what is gone.

    With `shown`, nothing is done and False returned unless that is what still stands.
    """
    standing: Standing = yield Look(shard_id)
    if shown not in (None, standing):
        return False
    for mark in standing.marks:
        yield Delete("_ledger", mark.name)
    yield Delete("data", f"{shard_id}.parquet")
    yield Delete("errors", f"{shard_id}.parquet")
    return True


# --- The claim: which model a dataset is of --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identify:
    """Answer: what the dataset says it is; None where it says nothing."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Answer: the fingerprint of the model that the marks are of, or without them the parts; None if nothing stands."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Say what the dataset is, unless it says something already. Answer: nothing."""

    identity: Any


@dataclass(frozen=True, slots=True)
class Disown:
    """Delete what the dataset says it is. Answer: nothing."""


def claim_steps(ours: Any, model_of: Callable[[Any], str]) -> Steps[bool]:
    """The steps that make a dataset our model's, for its whole life; False if it is another's.

    An empty dataset may change hands while a commit of its old owner is under way. So the look for parts comes after
    the claim, as a commit confirms the claim after its part: at least one of the two sees the other and withdraws.
    """
    theirs = yield Identify()
    is_ours = theirs is not None and model_of(theirs) == model_of(ours)
    if theirs is not None and not is_ours:
        if (yield Owner()) is not None:
            return False
        yield Disown()
    if not is_ours:
        yield Claim(ours)
        found = yield Identify()
        if found is None or model_of(found) != model_of(ours):
            return False
    owner = yield Owner()
    if owner in (None, model_of(ours)):
        return True
    yield Disown()
    if theirs is not None and owner == model_of(theirs):
        yield Claim(theirs)
    return False
