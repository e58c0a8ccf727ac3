"""The arithmetic of benchmarks/compare.py."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields

import pytest

from benchmarks.summary import Line, Outcome, agreement, as_csv, best, line, ratio, steady_rate, together


def outcome(steady: float, seconds: float = 10.0, first_part: float | None = None) -> Outcome:
    return Outcome(images=100, seconds=seconds, steady=steady, first_batch=3.0, first_part=first_part)


def test_steady_state_counts_from_when_half_of_the_images_are_done():
    slow_start = [(100.0, 10), (109.0, 10), (110.0, 10), (111.0, 10)]
    assert steady_rate(slow_start) == 20 / 2


def test_steady_state_does_not_depend_on_the_order_of_the_notes():
    events = [(2.0, 32), (1.0, 32), (4.0, 16), (3.0, 32)]
    assert steady_rate(events) == steady_rate(sorted(events)) == 48 / 2


def test_a_batch_that_crosses_the_half_is_not_counted_into_the_second():
    assert steady_rate([(0.0, 30), (1.0, 40), (3.0, 30)]) == 30 / 2


def test_what_is_done_at_once_has_no_steady_state():
    assert math.isnan(steady_rate([(5.0, 100)]))
    with pytest.raises(ValueError, match="nothing"):
        steady_rate([])


def test_two_steps_on_the_same_cores_add_their_times():
    assert together(1457, 133.0) == pytest.approx(121.9, abs=0.05)
    assert together(100, 100) == 50


def test_a_line_holds_medians_and_rates_per_core():
    found = line(("resnet18", "peer", "as it comes"), [outcome(10, 20), outcome(30, 10), outcome(20, 5)], cores=4)
    assert (found.steady, found.steady_per_core, found.seconds, found.whole) == (20, 5, 10, 10)
    assert (found.images, found.rounds, found.first_part) == (100, 3, None)
    assert line(("m", "ours", "ours"), [outcome(1, first_part=4), outcome(1, first_part=6)], 1).first_part == 5


def test_ratios_are_taken_round_by_round():
    assert ratio([10, 40, 20], [5, 20, 20]) == 2
    with pytest.raises(ValueError, match="shorter"):
        ratio([1, 2], [1])


def test_the_best_is_sought_among_its_kind():
    lines = [
        Line("m", "ours", "ours", 100, 1, 90, 45, whole=50),
        Line("m", "a", "as it comes", 100, 1, 40, 20, whole=10),
        Line("m", "b", "as it comes", 100, 1, 30, 15, whole=20),
    ]
    assert best(lines, "as it comes", "steady").arm == "a"
    assert best(lines, "as it comes", "whole").arm == "b"
    assert best(lines, "our network", "whole") is None


def test_agreement_is_by_key():
    assert agreement({"a": 1, "b": 2}, {"b": 2, "a": 3}) == 0.5


def test_the_table_has_a_column_for_every_field():
    (row,) = csv.DictReader(io.StringIO(as_csv([Line("m", "Ray, documented", "ours", 100, 1, 90.123456, 45)])))
    assert (row["arm"], row["steady"], row["whole"]) == ("Ray, documented", "90.12", "")
    assert row.keys() == {field.name for field in fields(Line)}
