"""The arithmetic of `compare`: from completion times to rates, medians and ratios."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import median

Done = tuple[float, int]  # at which time, in seconds, so many images more were done


@dataclass(frozen=True)
class Outcome:
    """One run of one arm. Rates in images/s, times in seconds from the start of its process."""

    images: int
    seconds: float  # until its process had ended
    steady: float
    first_batch: float
    first_part: float | None = None  # until the first part was committed

    @property
    def whole(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Line:
    """An arm in the table: medians over the rounds."""

    model: str
    arm: str
    kind: str
    images: int
    rounds: int
    steady: float
    steady_per_core: float
    whole: float | None = None
    seconds: float | None = None
    first_batch: float | None = None
    first_part: float | None = None
    peak_mb: float | None = None
    agreement: float | None = None  # share of the images that have the class that ours gave them
    ours_steady: float | None = None  # ours is so many times as fast
    ours_whole: float | None = None


def steady_rate(done: Iterable[Done]) -> float:
    """Images/s over the second half of the images: from when half of them were done until the last one was.

    Start-up is left out, and what was computed until then. NaN where it all was done at once.
    """
    events = sorted(done)
    total = sum(count for _, count in events)
    so_far = 0
    for at, count in events:
        so_far += count
        if 2 * so_far >= total:
            seconds = events[-1][0] - at
            return (total - so_far) / seconds if seconds > 0 else float("nan")
    raise ValueError("nothing was done")


def together(decoding: float, network: float) -> float:
    """What two steps allow that share the same cores, in images/s."""
    return 1 / (1 / decoding + 1 / network)


def line(names: tuple[str, str, str], outcomes: Sequence[Outcome], cores: int) -> Line:
    """The medians of an arm; `names` are those of model, arm and kind."""
    steady = median(outcome.steady for outcome in outcomes)
    parts = [outcome.first_part for outcome in outcomes if outcome.first_part is not None]
    return Line(
        *names,
        images=outcomes[0].images,
        rounds=len(outcomes),
        steady=steady,
        steady_per_core=steady / cores,
        whole=median(outcome.whole for outcome in outcomes),
        seconds=median(outcome.seconds for outcome in outcomes),
        first_batch=median(outcome.first_batch for outcome in outcomes),
        first_part=median(parts) if parts else None,
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of ours/theirs, round by round: the machine may be slower in one round than in another."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def best(lines: Iterable[Line], kind: str, what: str) -> Line | None:
    """The fastest arm of a kind by `steady` or `whole`."""
    return max((line for line in lines if line.kind == kind), key=lambda line: float(getattr(line, what)), default=None)


def agreement(ours: Mapping[str, int], theirs: Mapping[str, int]) -> float:
    """Share of the images that have the same class. Both have the same keys."""
    return sum(theirs[key] == class_id for key, class_id in ours.items()) / len(ours)


def as_csv(lines: Iterable[Line]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(field.name for field in fields(Line))
    table.writerows(map(_cell, astuple(line)) for line in lines)
    return text.getvalue()


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
