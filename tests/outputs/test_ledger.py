"""Marks, and what is believed of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.outputs.ledger import Mark, Standing, Standings, commit_hash, marks_by_shard

HEX = st.text("0123456789abcdef", min_size=16, max_size=16)
SHARD_IDS = st.text("abzABZ019.-", min_size=1, max_size=97).filter(lambda name: not name.startswith("."))


@given(shard_id=SHARD_IDS, fingerprint=HEX, commit=HEX)
def test_a_mark_is_its_file_name(shard_id: str, fingerprint: str, commit: str):
    mark = Mark(shard_id, fingerprint, commit)
    assert Mark.parse(mark.name) == mark


@pytest.mark.parametrize("name", ["", "notes.txt", "a.json", "a.b.json", "x.aa.bb.parquet", ".nfs0001"])
def test_other_files_are_no_marks(name: str):
    assert Mark.parse(name) is None


def test_a_mark_is_believed_only_alone_and_with_the_versions_it_vouches_for():
    good = Mark("a", "source", commit_hash("p1", "e1"))
    assert Standing((good,), "p1", "e1").fingerprint == "source"
    assert Standing((good,), "p2", "e1").fingerprint is None
    assert Standing((good,), "p1", "e2").fingerprint is None
    assert Standing((good,), "p1", None).fingerprint is None
    assert Standing((good,), None, "e1").fingerprint is None
    assert Standing((good, Mark("a", "other", "x")), "p1", "e1").fingerprint is None
    assert Standing((), "p1", "e1").fingerprint is None
    assert commit_hash("p1", None) != commit_hash("p1", "None")


def test_what_stands_is_sorted_by_shard():
    a, b = Mark("a.tar", "f", "c"), Mark("b", "f", "c")
    marks = marks_by_shard([a, b, Mark("a.tar", "g", "c")])
    found = Standings(marks, {"a.tar": "1", "c": "2"}, {"d": "3"})
    assert len(found) == 4
    assert found.get("e") is None
    assert found == {
        "a.tar": Standing((a, Mark("a.tar", "g", "c")), "1"),
        "b": Standing((b,)),
        "c": Standing((), "2"),
        "d": Standing((), None, "3"),
    }
