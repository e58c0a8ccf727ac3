"""What bounded a run, from what its time went into, and what to change. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import Precision
from pipeline.timing import Spent

Bound = Literal["network", "decode", "read", "write", "start-up", "overhead"]

MIN_SECONDS = 5.0  # of steady work; below that, starting up is what the time went into
BUSY = 0.8  # of the time of a device, of readers or of cores
IDLE = 0.5  # of the cores' time: with less work than that they bounded nothing
FEW = 1.5  # times as many cores as readers: else it makes no difference that they are fewer
WAITING = 0.4  # of the readers' time, spent on a store's answers
HELD_UP = 0.2  # of the time, in which commits kept everything else waiting


@dataclass(frozen=True)
class Usage:
    """What a run had, and what became of it."""

    seconds: float  # from the first results to the last commit
    start_up_s: float  # before that, once Ray was there
    write_s: float  # in which nothing could go on but commits
    cores: int
    shards: int
    readers: float  # as `readers_at_once`
    actors: int  # that have what they compute on
    device: str  # cpu or cuda
    precision: Precision
    spent: Spent


@dataclass(frozen=True)
class Verdict:
    """`shares` are those of the time (or of the cores' time, where it says so), from 0 to 1; there are none where the
    bound is start-up."""

    bound: Bound
    shares: dict[str, float]
    advice: str

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"{self.bound}{f' ({figures})' if figures else ''}. {self.advice}"


def readers_at_once(sizes: Sequence[int]) -> float:
    """How many shards of these sizes can be read at once on the average: each is read by one process, and the largest
    one goes on while the others are done."""
    return sum(sizes) / max(sizes) if any(sizes) else len(sizes)


def are_few(shards: int, cores: int) -> bool:
    """Whether a run reads so many shards in one stage and decodes in another, so that a single one uses all cores."""
    return shards < cores


def judge(usage: Usage) -> Verdict:
    """The first thing that was at its limit, looked at from the output to the input."""
    spent, seconds = usage.spent, max(usage.seconds, 1e-3)
    cpu = usage.cores * seconds
    readers = min(usage.readers, usage.cores) * seconds
    shares = {
        "actors at work": min(spent.predict_s / (usage.actors * seconds), 1.0),
        # What was done before the first results came is in `spent`, and its time is not in `seconds`.
        "cores at the network": min(spent.predict_cpu_s / cpu, 1.0),
        "cores at reading and decoding": min((spent.read_cpu_s + spent.decode_cpu_s) / cpu, 1.0),
        "readers waiting for the store": min(spent.read_wait_s / readers, 1.0),
        "held up by writing": min(usage.write_s / seconds, 1.0),
    }
    if are_few(usage.shards, usage.cores) or usage.readers < usage.cores / FEW:
        decoding = 0.0 if are_few(usage.shards, usage.cores) else spent.decode_cpu_s
        readers += min(usage.readers, usage.cores) * usage.start_up_s
        shares["readers at work"] = min((spent.read_wait_s + spent.read_cpu_s + decoding) / readers, 1.0)
    bound = _bound(shares, usage)
    if bound == "start-up":  # most work was done before those few seconds: of them it could be 100 % and more
        shares = {}
    advice = _on_the_network(shares, usage) if bound == "network" else ADVICE[bound]
    if bound == "read" and "readers at work" in shares and shares["readers at work"] >= BUSY:
        advice = "Each shard is read by one process, and cores were left over: more shards, of about the same size."
    if bound == "decode" and usage.device == "cuda":
        advice = "The GPUs wait for decoding: more CPUs for each, or images stored closer to the network's size."
    return Verdict(bound, {name: round(share, 3) for name, share in shares.items()}, advice)


def _bound(shares: dict[str, float], usage: Usage) -> Bound:
    if usage.seconds < max(MIN_SECONDS, usage.start_up_s / 2):
        return "start-up"
    if shares["held up by writing"] >= HELD_UP:
        return "write"
    on_cpu = usage.device == "cpu"
    if not on_cpu and shares["actors at work"] >= BUSY:
        return "network"
    # With few shards reading is a stage of its own, and may wait while others compute what was read.
    waits = not are_few(usage.shards, usage.cores) and shares["readers waiting for the store"] >= WAITING
    if waits or (shares.get("readers at work", 0.0) >= BUSY and _cores_at_work(shares, usage) < BUSY):
        return "read"
    if _cores_at_work(shares, usage) < IDLE:
        return "network" if shares["actors at work"] >= BUSY else "overhead"
    at_network = shares["cores at the network"] if on_cpu else 0.0
    return "network" if at_network >= shares["cores at reading and decoding"] else "decode"


def _cores_at_work(shares: dict[str, float], usage: Usage) -> float:
    at_network = shares["cores at the network"] if usage.device == "cpu" else 0.0
    return at_network + shares["cores at reading and decoding"]


def _on_the_network(shares: dict[str, float], usage: Usage) -> str:
    """What makes it faster. Lower precision is news only to who has the full one."""
    is_full = usage.precision == "float32"
    if usage.device == "cuda":
        lower = ", or model.precision=bfloat16 in a new dataset" if is_full else ""
        return f"The GPUs are busy: more of them{lower}."
    if _cores_at_work(shares, usage) < IDLE:
        return "To go faster: more actors (runtime.actors), since those that there are leave cores idle."
    lower = ", model.precision=int8 in a new dataset (bfloat16: on some CPUs)" if is_full else ""
    return f"To go faster: more cores, a GPU{lower}."


ADVICE: dict[Bound, str] = {
    "decode": "To go faster: more cores, or images stored closer to the size that the network takes.",
    "read": "The store answers slowly: more CPUs read more shards at once; so do larger shards and a nearer bucket.",
    "write": "Commits are slow: larger shards make fewer of them; so does a faster store for the output.",
    "overhead": "Nothing was at its limit: handing blocks on took the time. Larger shards make it less.",
    "start-up": "There was little to do: most of the time went into starting processes.",
}
