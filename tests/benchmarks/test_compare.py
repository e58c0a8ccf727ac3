"""What an arm of benchmarks/compare.py must return."""

from __future__ import annotations

import pytest

from benchmarks.arms import Done
from benchmarks.compare import checked
from benchmarks.summary import Outcome

OURS = {f"{number:03}": number % 40 for number in range(100)}


def done(classes: dict[str, int]) -> Done:
    outcome = Outcome(images=len(classes), seconds=10.0, steady=20.0, first_batch=3.0)
    return Done(outcome, classes, peak_mb=None)


def test_one_image_in_a_hundred_may_have_another_class():
    checked("peer", done({**OURS, "007": 39}), set(OURS), OURS)
    with pytest.raises(SystemExit, match=r"peer: top-1 agrees with ours on 98.0% only"):
        checked("peer", done({**OURS, "007": 39, "008": 39}), set(OURS), OURS)


def test_every_sample_has_a_row():
    with pytest.raises(SystemExit, match="1 have no row, and 0 rows"):
        checked("peer", done({key: 0 for key in OURS if key != "007"}), set(OURS), None)
    with pytest.raises(SystemExit, match="0 have no row, and 1 rows"):
        checked("peer", done({**OURS, "another": 0}), set(OURS), None)
