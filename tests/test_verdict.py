"""What is called the bound of a run, for runs whose bound is plain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.timing import Spent
from pipeline.verdict import Usage, judge, readers_at_once

CPU = Usage(
    seconds=100,
    start_up_s=10,
    write_s=0,
    cores=4,
    shards=40,
    readers=40,
    actors=1,
    device="cpu",
    precision="float32",
    spent=Spent(),
)
GPU = replace(CPU, device="cuda")


@pytest.mark.parametrize(
    ("usage", "bound"),
    [
        (replace(CPU, spent=Spent(10, 5, 60, 30, 99, 350)), "network"),
        (replace(CPU, spent=Spent(40, 20, 360, 340, 50, 20)), "decode"),
        (replace(CPU, spent=Spent(300, 10, 60, 60, 50, 40)), "read"),
        (replace(GPU, spent=Spent(40, 20, 200, 200, 97, 100)), "network"),
        (replace(GPU, spent=Spent(40, 20, 340, 330, 30, 40)), "decode"),
        (replace(GPU, spent=Spent(340, 20, 40, 40, 30, 40)), "read"),
        (replace(GPU, spent=Spent(40, 20, 40, 40, 30, 40), write_s=50), "write"),
        (replace(CPU, spent=Spent(40, 20, 60, 50, 90, 80)), "network"),
        (replace(CPU, spent=Spent(40, 20, 60, 50, 50, 80)), "overhead"),
        (replace(GPU, spent=Spent(40, 20, 100, 100, 50, 90)), "overhead"),
    ],
)
def test_the_bound_is_what_was_at_its_limit(usage: Usage, bound: str) -> None:
    verdict = judge(usage)
    assert verdict.bound == bound
    assert str(verdict).startswith(f"{bound} (actors at work ")
    assert all(0 <= share <= 1 for share in verdict.shares.values())


@pytest.mark.parametrize("usage", [replace(CPU, spent=Spent(9, 9, 9, 9, 9, 9), seconds=1), replace(CPU, seconds=0)])
def test_a_short_run_has_no_shares_of_its_time(usage: Usage) -> None:
    """Where all rows come in one block, all work was done before those seconds began."""
    assert judge(usage).shares == {}
    assert str(judge(usage)).startswith("start-up. There was little to do")


def test_waiting_for_a_core_is_not_waiting_for_the_store() -> None:
    """Twice as many processes as cores: everything takes twice its CPU time."""
    crowded = replace(CPU, spent=Spent(read_s=200, read_cpu_s=100, decode_s=560, decode_cpu_s=280))
    assert judge(crowded).shares["readers waiting for the store"] == 0
    assert judge(crowded).bound == "decode"


@pytest.mark.parametrize(
    ("spent", "bound"),
    [
        (Spent(95, 5, 20, 20, 50, 40), "read"),  # from a slow store
        (Spent(95, 93, 20, 20, 50, 40), "read"),  # packed
        (Spent(60, 5, 20, 20, 99, 350), "network"),
        (Spent(60, 5, 350, 340, 50, 20), "decode"),
        (Spent(60, 5, 20, 20, 50, 40), "overhead"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_single_reader_may_be_the_limit(spent: Spent, bound: str, device: str) -> None:
    """Of which the other cores see nothing."""
    verdict = judge(replace(CPU, shards=1, readers=1, device=device, spent=spent))
    assert verdict.bound == bound
    assert ("more shards" in verdict.advice) == (bound == "read")


def test_more_shards_are_not_advised_where_the_cores_are_full() -> None:
    assert judge(replace(CPU, cores=2, shards=1, readers=1, spent=Spent(95, 93, 20, 20, 95, 80))).bound == "decode"


def test_two_readers_on_three_cores_may_be_the_limit() -> None:
    assert judge(replace(CPU, cores=3, shards=2, readers=2, spent=Spent(190, 10, 20, 20, 50, 40))).bound == "read"


def test_what_a_reader_has_read_before_the_first_results_came_does_not_make_it_the_limit() -> None:
    short = Usage(12, 12, 0, 2, 1, 1, 1, "cpu", "float32", Spent(10, 9, 2, 2, 12, 21))
    assert judge(short).bound == "network"


def test_one_large_shard_among_many_is_named() -> None:
    """Its reader also decodes."""
    verdict = judge(replace(CPU, readers=1.2, spent=Spent(25, 15, 95, 90, 60, 40)))
    assert (verdict.bound, "of about the same size" in verdict.advice) == ("read", True)
    similar = replace(CPU, cores=16, shards=16, readers=15.9, spent=Spent(40, 20, 1250, 1240, 60, 300))
    assert judge(similar).bound == "decode", "all cores were at work"
    assert readers_at_once([100, 5, 5, 5, 5]) == 1.2
    assert readers_at_once([7, 7, 7]) == 3
    assert readers_at_once([0, 0]) == 2, "sizes that a web server does not tell"


def test_more_cpus_are_advised_only_where_the_gpu_waits() -> None:
    assert "more CPUs" in judge(replace(GPU, spent=Spent(40, 20, 340, 330, 30, 40))).advice
    assert "more CPUs" not in judge(replace(GPU, spent=Spent(40, 20, 200, 200, 97, 100))).advice


def test_an_actor_that_leaves_cores_idle_is_advised_more_of_them() -> None:
    idle = judge(replace(CPU, cores=32, spent=Spent(40, 20, 60, 50, 99, 300)))
    assert (idle.bound, "runtime.actors" in idle.advice, "more cores" in idle.advice) == ("network", True, False)
    full = judge(replace(CPU, spent=Spent(10, 5, 60, 30, 99, 350)))
    assert ("runtime.actors" in full.advice, "more cores" in full.advice) == (False, True)


@pytest.mark.parametrize(
    "usage", [replace(CPU, spent=Spent(9, 5, 9, 9, 99, 350)), replace(GPU, spent=Spent(9, 5, 9, 9, 97))]
)
def test_a_lower_precision_is_advised_to_who_has_the_full_one(usage: Usage) -> None:
    assert "model.precision" in judge(usage).advice
    for precision in ("bfloat16", "float16", "int8"):
        lower = judge(replace(usage, precision=precision))
        assert (lower.bound, "model.precision" in lower.advice) == ("network", False)
