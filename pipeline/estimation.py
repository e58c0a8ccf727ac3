"""How long a run will take, what will bound it and what it will cost, from a measured sample; and how right that was.

Pure: what is measured comes from `sampling.py`. The model behind it: decoders work side by side on the cores, the
network works beside them (a GPU) or on the same cores (a CPU), and commits hide behind both unless the store is slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.verdict import Bound, are_few, readers_at_once

RAY_CPU_S = 0.2e-3  # of a core per image: what Ray, the driver and the committer take (docs/performance.md)
FORMAT = 2
PREDICTION = ("_runs", "estimate.json")  # within the dataset


@dataclass(frozen=True)
class Measured:
    """A sample's figures. Seconds are per image unless they say otherwise."""

    images: int  # that were sampled, each counted once
    bytes_per_image: float  # of the shards' size
    predicted: float  # the share of images that are; the others become error rows
    read_wait_s: float  # for the store, of one reader
    read_cpu_s: float
    decode_cpu_s: float  # of one core, while all of them decode, or 16
    network_s: float  # per predicted image, of one device that does nothing else; on a CPU of all cores of a node
    row_bytes: float  # in a part, of an image that is predicted
    part_bytes: float  # of a part besides its rows
    put_s: float  # of one part
    start_up_s: float  # from the command to the first block at work, Ray's own start included
    engine: str
    device: str
    batch_size: int
    actors: int  # that have what they compute on
    nodes: int
    cores: int  # of all nodes
    commits_at_once: int
    model_fingerprint: str


@dataclass(frozen=True)
class Estimate:
    """A prediction for the shards that are to do."""

    shards: int
    num_bytes: int
    images: int
    seconds: float
    images_per_s: float  # once it has started
    output_bytes: int
    bound: Bound
    cores_per_device: float | None  # to keep a GPU busy; None where the network computes on the CPU
    cost: float | None  # where a price is given, in its currency
    measured: Measured


def estimate(measured: Measured, sizes: list[int], price_per_hour: float | None = None) -> Estimate:
    """What the shards of these sizes, in bytes, will take. `price_per_hour` is that of the whole cluster."""
    images = max(round(sum(sizes) / measured.bytes_per_image), 1)
    rates = stage_rates(measured, images, sizes)
    cpu = measured.device == "cpu"
    rate = min(rates["read"], rates["write"], rates["network"], _on_cores(rates, measured) if cpu else rates["decode"])
    bound = _bound(rates, rate, cpu, are_few(len(sizes), measured.cores))
    seconds = measured.start_up_s + images / rate + measured.put_s
    feeding_s = measured.read_wait_s + measured.read_cpu_s + measured.decode_cpu_s + RAY_CPU_S
    return Estimate(
        shards=len(sizes),
        num_bytes=sum(sizes),
        images=images,
        seconds=round(seconds, 1),
        images_per_s=round(rate, 1),
        output_bytes=round(images * measured.predicted * measured.row_bytes + len(sizes) * measured.part_bytes),
        bound="start-up" if measured.start_up_s > seconds / 2 else bound,
        cores_per_device=None if cpu else round(feeding_s / measured.network_s / measured.predicted, 1),
        cost=None if price_per_hour is None else round(price_per_hour * seconds / 3600, 2),
        measured=measured,
    )


def stage_rates(measured: Measured, images: int, sizes: list[int]) -> dict[str, float]:
    """Images/s of each stage if it were alone, on all that the run has. A shard is read by one process."""
    cpu_s = measured.read_cpu_s + measured.decode_cpu_s + RAY_CPU_S
    reader_cpu_s = measured.read_cpu_s if are_few(len(sizes), measured.cores) else cpu_s
    # One actor takes all cores of its node; what a second one there would add is not measured.
    devices = min(measured.nodes, measured.actors) if measured.device == "cpu" else measured.actors
    return {
        "read": min(measured.cores, readers_at_once(sizes)) / (measured.read_wait_s + reader_cpu_s),
        "decode": measured.cores / cpu_s,
        "network": devices / measured.network_s / measured.predicted,
        "write": measured.commits_at_once * images / len(sizes) / measured.put_s,
    }


def _on_cores(rates: dict[str, float], measured: Measured) -> float:
    """Of decoding and a network on the same cores: all of them, if need be, since decoders go where there is room."""
    return 1 / (1 / rates["decode"] + measured.network_s * measured.predicted / measured.nodes)


def _bound(rates: dict[str, float], rate: float, cpu: bool, few_shards: bool) -> Bound:
    """The stage that sets the rate. Reading includes decoding, unless there are few shards."""
    if rate == rates["write"]:
        return "write"
    if rate == rates["read"] and (few_shards or rates["read"] < rates["decode"] / 1.5):
        return "read"
    if cpu or rate == rates["network"]:
        return "network" if rates["network"] < rates["decode"] else "decode"
    return "decode"


def score(prediction: dict[str, Any], seconds: float, images_per_s: float) -> dict[str, float]:
    """A prediction beside what came of it; `error` is the predicted time over the actual, less 1."""
    return {
        "predicted_seconds": prediction["seconds"],
        "predicted_images_per_s": prediction["images_per_s"],
        "seconds": round(seconds, 1),
        "images_per_s": images_per_s,
        "error": round(prediction["seconds"] / seconds - 1, 3),
    }


def is_about(prediction: dict[str, Any], sizes: list[int], run: Mapping[str, Any]) -> bool:
    """Whether a prediction is for these shards, and was measured with what the run has: `run` names fields of Measured
    and their values."""
    return prediction.get("format") == FORMAT and (
        (prediction["shards"], prediction["num_bytes"], {name: prediction["measured"][name] for name in run})
        == (len(sizes), sum(sizes), dict(run))
    )


def describe(estimate: Estimate) -> dict[str, str]:
    """For a reader: names and sentences."""
    found = estimate.measured
    rows = {
        "will take": f"{estimate.seconds:,.0f} s, of which {found.start_up_s:.0f} s to start,"
        f" at {estimate.images_per_s:,.0f} images/s",
        "images": f"{estimate.images:,}, of {found.bytes_per_image / 1000:,.1f} kB on average"
        + (f"; {1 - found.predicted:.1%} become error rows" if found.predicted < 1 else ""),
        "output": f"{estimate.output_bytes / 1e6:,.1f} MB",
        "bound by": estimate.bound,
        "measured": f"on {found.images} images, {found.engine} on {found.device}, batches of {found.batch_size}: a core"
        f" reads and decodes {1 / (found.read_cpu_s + found.decode_cpu_s):,.0f} images/s and waits"
        f" {found.read_wait_s * 1000:.1f} ms for each; a device computes {1 / found.network_s:,.0f} images/s",
    }
    if estimate.cores_per_device is not None:
        rows["to feed a device"] = f"{estimate.cores_per_device:.1f} cores"
    if estimate.cost is not None:
        rows["cost"] = f"{estimate.cost:,.2f}"
    return rows
