"""What is predicted from a sample's figures, and how a prediction is scored."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.estimation import FORMAT, Measured, describe, estimate, is_about, score

MEASURED = Measured(
    images=256,
    bytes_per_image=100_000,
    predicted=1.0,
    read_wait_s=0.0,
    read_cpu_s=0.1e-3,
    decode_cpu_s=1.7e-3,  # with Ray's share: 500 images/s of a core
    network_s=0.01,
    row_bytes=1500,
    part_bytes=0,
    put_s=0.05,
    start_up_s=10,
    engine="openvino",
    device="cpu",
    batch_size=32,
    actors=1,
    nodes=1,
    cores=2,
    commits_at_once=16,
    model_fingerprint="f" * 16,
)
GPU = replace(MEASURED, device="cuda", engine="eager", network_s=0.5e-3, start_up_s=1)
SHARDS = [100_000_000] * 10  # 10,000 images


def test_on_a_cpu_decoding_and_the_network_share_the_cores() -> None:
    found = estimate(MEASURED, SHARDS)
    assert found.images == 10_000
    assert found.images_per_s == pytest.approx(1 / (1 / 1000 + 1 / 100), rel=0.001)
    assert found.seconds == pytest.approx(10 + 10_000 / (1 / (1 / 1000 + 1 / 100)) + 0.05, rel=0.001)
    assert (found.bound, found.cores_per_device, found.cost) == ("network", None, None)
    assert found.output_bytes == 15_000_000


def test_a_gpu_is_as_fast_as_it_is_fed() -> None:
    fed = estimate(replace(GPU, cores=16), SHARDS)
    hungry = estimate(GPU, SHARDS)
    assert (fed.images_per_s, fed.bound) == (pytest.approx(2000), "network")
    assert (hungry.images_per_s, hungry.bound) == (pytest.approx(1000), "decode")
    assert fed.cores_per_device == hungry.cores_per_device == pytest.approx(4.0)
    two = estimate(replace(GPU, cores=16, actors=2), SHARDS)
    assert two.images_per_s == pytest.approx(4000)


def test_actors_on_some_nodes_only_compute_on_these() -> None:
    """The other nodes' cores decode meanwhile."""
    four = estimate(replace(MEASURED, nodes=4, cores=8, actors=4), SHARDS)
    assert four.images_per_s == pytest.approx(1 / (1 / 4000 + 1 / 400), rel=0.001)
    one = estimate(replace(MEASURED, nodes=4, cores=8, actors=1), SHARDS)
    assert one.images_per_s == pytest.approx(100)
    assert estimate(replace(MEASURED, actors=5), SHARDS) == replace(
        estimate(MEASURED, SHARDS), measured=replace(MEASURED, actors=5)
    )


@pytest.mark.parametrize("measured", [MEASURED, replace(GPU, cores=16)])
def test_what_cannot_be_decoded_takes_no_network_and_no_room(measured: Measured) -> None:
    half = estimate(replace(measured, predicted=0.5), SHARDS)
    assert half.images == 10_000
    assert half.output_bytes == 7_500_000
    assert half.seconds == estimate(replace(measured, network_s=measured.network_s / 2), SHARDS).seconds
    assert "50.0% become error rows" in describe(half)["images"]
    assert "error rows" not in describe(estimate(measured, SHARDS))["images"]


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"read_wait_s": 0.05}, "read"),
        ({"put_s": 200.0}, "write"),
        ({"decode_cpu_s": 50e-3}, "decode"),
        ({"start_up_s": 1000}, "start-up"),
    ],
)
def test_what_bounds_it_is_named(changes: dict[str, float], bound: str) -> None:
    assert estimate(replace(MEASURED, **changes), SHARDS).bound == bound


@pytest.mark.parametrize(
    ("sizes", "readers"),
    [([10**9], 1), ([10**9] * 3, 3), ([10**9, 10**8, 10**8], 1.2), ([10**9] * 16, 16), ([10**9] * 1000, 16)],
)
def test_a_shard_is_read_by_one_process(sizes: list[int], readers: float) -> None:
    """Here from a slow store, or packed, so that a reader takes 2 ms for an image. Decoding is a stage of its own where
    there are fewer shards than cores."""
    slow = replace(GPU, cores=16, network_s=1e-5, read_wait_s=1.5e-3, read_cpu_s=0.5e-3)
    at_once = 2e-3 if len(sizes) < 16 else 2e-3 + 1.9e-3
    found = estimate(slow, sizes)
    assert found.images_per_s == pytest.approx(readers / at_once, rel=0.01)
    assert found.bound == "read"
    busy = estimate(replace(slow, network_s=0.01), sizes)
    assert (busy.images_per_s, busy.bound) == (pytest.approx(100), "network")


def test_what_a_part_has_once_counts_for_every_shard() -> None:
    assert estimate(replace(MEASURED, part_bytes=4000), SHARDS).output_bytes == 15_040_000


def test_money_is_time_at_a_price() -> None:
    found = estimate(MEASURED, SHARDS, price_per_hour=36)
    assert found.cost == pytest.approx(found.seconds / 100, abs=0.01)
    assert describe(found)["cost"] == f"{found.cost:.2f}"


@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=20),
    st.sampled_from(["read_wait_s", "read_cpu_s", "decode_cpu_s", "network_s", "put_s"]),
    st.sampled_from([MEASURED, GPU]),
)
def test_nothing_gets_faster_by_getting_slower(sizes: list[int], name: str, measured: Measured) -> None:
    slower = replace(measured, **{name: getattr(measured, name) * 2 + 1e-3})
    assert estimate(slower, sizes).seconds >= estimate(measured, sizes).seconds - 0.1


def test_a_prediction_is_scored_only_by_the_run_that_it_is_about() -> None:
    found = estimate(MEASURED, SHARDS)
    prediction = asdict(found) | {"format": FORMAT}
    run = {"model_fingerprint": "f" * 16, "engine": "openvino", "cores": 2}
    assert is_about(prediction, SHARDS, run)
    assert not is_about(prediction, SHARDS[1:], run)
    for name, other in (("model_fingerprint", "e" * 16), ("engine", "eager"), ("cores", 16)):
        assert not is_about(prediction, SHARDS, run | {name: other})
    assert not is_about({"format": 0}, SHARDS, run)
    assert score(prediction, found.seconds / 1.25, 100.0)["error"] == pytest.approx(0.25, abs=0.001)
