"""The error budget: what a run puts up with."""

from __future__ import annotations

import pytest

from pipeline.budget import FEWEST, ErrorBudget


def test_without_limits_everything_is_put_up_with() -> None:
    assert ErrorBudget().spend(1000, 1000) is None


@pytest.mark.parametrize(("limit", "errors", "stops"), [(0, 0, False), (0, 1, True), (3, 3, False), (3, 4, True)])
def test_a_number(limit: int, errors: int, stops: bool) -> None:
    budget = ErrorBudget(max_errors=limit)
    assert budget.spend(10, 0) is None
    found = budget.spend(10, errors)
    assert (found is not None) == stops
    if found:
        assert f"{errors} of 20 samples" in found
        assert f"input.max_errors={limit}" in found


def test_a_share_of_all_samples_so_far() -> None:
    budget = ErrorBudget(max_error_rate=0.1)
    assert budget.spend(900, 90) is None
    assert budget.spend(100, 10) is None
    found = budget.spend(0, 1)
    assert found == "101 of 1000 samples so far are error rows (10.1%), more than input.max_error_rate=0.1"


def test_the_first_few_samples_do_not_decide_but_a_small_rotten_source_does() -> None:
    assert ErrorBudget(max_error_rate=0.05).spend(1, 1) is None, "one bad image at the very beginning"
    assert ErrorBudget(max_error_rate=0.05).spend(20, 5) is None
    assert ErrorBudget(max_error_rate=0.05).spend(20, 6) is not None, "more than 5 % of a hundred"
    assert ErrorBudget(max_error_rate=0.0).spend(1, 1) is not None
    assert FEWEST == 100


@pytest.mark.parametrize(("errors", "stops"), [(0, False), (2, False), (3, True), (20, True)])
def test_a_small_source_is_judged_by_all_that_it_has(errors: int, stops: bool) -> None:
    budget = ErrorBudget(max_error_rate=0.1)
    budget.spend(20, errors)
    assert (budget.conclude() is not None) == stops
    assert ErrorBudget().conclude() is None
