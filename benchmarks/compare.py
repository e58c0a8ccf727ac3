"""Photographs in shards to labels in Parquet: ours, its peers, and what the cores allow, in turn on the same cores.

    pip install '.[cpu,bench]'
    python -m benchmarks.compare PHOTOGRAPHS|TARS [--models resnet18 resnet50] [--images 4000 1000] [--rounds 3]

Every arm is a process of its own (peers/*.py), with the same samples, the same weights file and the same cores. After
a round that doesn't count, in which memory is measured, the arms run in turn, round after round. *Steady* is the rate
over the second half of the images, *whole* that from the start of the process to its exit. *Limit* is
1/(1/D + 1/N): D reading and decoding alone, a process per core; N the fastest network alone, on decoded images.
Arms must return a row for every sample, and the same top-1 as ours for 99 % or more of the first 200 photographs and
their repetitions. The weights are made so that they tell these apart, else that would mean nothing.

The table and a plot go to `--out` as compare.csv and compare.svg.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from benchmarks.arms import ARMS, Arm, Done, Setting, is_installed, run_arm, run_limit, run_ray_init
from benchmarks.networks import CORES, write_weights
from benchmarks.photographs import as_parquet, pack, refuse_turned, refuse_unreadable, samples, take_tars
from benchmarks.summary import Line, Outcome, agreement, as_csv, best, line, ratio, together

AGREEMENT = 0.99
SEEN = 200  # photographs that the weights are made for
SMALL = 50  # images in a shard where start-up is measured
RAY_STARTS = 4  # in every round


def main() -> None:
    given = arguments()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        for model, images in zip(given.models, given.images, strict=True):
            setting = Setting(Path(name) / model, model)
            keys, known = prepare(setting, given.source, images, given.per_shard)
            found = compare(setting, keys, known, given.arms, given.rounds)
            lines += found
            show(found)
        if "ours" in given.arms:
            show_start_up(Setting(Path(name) / given.models[0], given.models[0]), given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compare.csv").write_text(as_csv(lines))
    if importlib.util.find_spec("matplotlib") is None:
        print("there is no plot: matplotlib is not installed (pip install '.[bench]')")
        return
    from benchmarks.plot import draw

    draw(lines, given.out / "compare.svg", f"photographs to labels on {CORES} cores, median of {given.rounds} rounds")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of photographs, or of tars of them")
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--images", nargs="+", type=int, default=[4000], help="one number, or one for every model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--per-shard", type=int, default=250, help="photographs in a tar that is packed here")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for compare.csv and compare.svg")
    given = parser.parse_args()
    if not given.source.is_dir():
        parser.error(f"{given.source} is no folder")
    if min(*given.images, given.rounds, given.per_shard) < 1:
        parser.error("--images, --rounds and --per-shard are at least 1")
    if importlib.util.find_spec("psutil") is None:
        parser.error("psutil is not installed: pip install '.[bench]'")
    if len(given.images) == 1:
        given.images *= len(given.models)
    if len(given.images) != len(given.models):
        parser.error("--images takes one number, or one for every model")
    given.arms = [name for name in ARMS if name in given.arms and is_installed(name)]
    return given


def prepare(setting: Setting, source: Path, images: int, per_shard: int) -> tuple[set[str], set[str]]:
    """The same samples as tars and as Parquet, and weights for the model. The keys of the samples, and those of the
    photographs that the weights are made for."""
    work = setting.work
    if any(source.glob("*.tar")):
        tars = take_tars(source, work / "tars", images)
    else:
        per_shard = min(per_shard, max(images // 4, 1))
        tars = pack(source, work / "tars", -(-images // per_shard), per_shard)
        pack(source, work / "small", 4, SMALL)
    as_parquet(tars, work / "parquet")
    listed = [sample for tar in tars for sample in samples(tar)]
    keys = {key for key, _ in listed}
    if len(keys) != len(listed):
        raise SystemExit("the tars hold a key twice, by which the rows of the arms could not be told apart")
    refuse_unreadable(listed)
    refuse_turned(listed)
    encoded = list(dict.fromkeys(data for _, data in listed))[:SEEN]
    if len(encoded) < 2:
        raise SystemExit(f"{source} holds one photograph only: with two or more, agreement can show something")
    write_weights(setting.model, encoded, setting.weights)
    seen = set(encoded)
    return keys, {key for key, data in listed if data in seen}


def compare(setting: Setting, keys: set[str], known: set[str], names: Sequence[str], rounds: int) -> list[Line]:
    """All arms in turn, a round that doesn't count and `rounds` that do. The top-1 of `known` keys is compared."""
    lines: list[Line] = []
    if "ours" in names:
        first = checked("ours", run_arm(ARMS["ours"], setting), keys, None)
        lines.append(line((setting.model, "resnet-batch run, the first time", "first time"), [first.outcome], CORES))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    peaks: dict[str, float | None] = {}
    least: dict[str, float] = {}
    limits: list[dict[str, float]] = []
    for number in range(rounds + 1):
        ours: dict[str, int] | None = None
        for name in names:
            done = checked(name, run_arm(ARMS[name], setting, memory=number == 0), keys, ours)
            ours = {key: done.classes[key] for key in known} if name == "ours" else ours
            if ours is not None:
                least[name] = min(least.get(name, 1.0), agreement(ours, done.classes))
            if number == 0:
                peaks[name] = done.peak_mb
            else:
                outcomes[name].append(done.outcome)
            print(f"  {setting.model} {number} {name}: {done.outcome.steady:.1f}, {done.outcome.whole:.1f} images/s")
        if number:
            limits.append(run_limit(setting))
    mine = outcomes.get("ours")
    for name in names:
        found = line((setting.model, ARMS[name].title, ARMS[name].kind), outcomes[name], CORES)
        found = replace(found, peak_mb=peaks[name], agreement=least.get(name))
        lines.append(found if mine is None else against(found, mine, outcomes[name]))
    return lines + limit_lines(setting.model, limits, mine)


def checked(name: str, done: Done, keys: set[str], ours: dict[str, int] | None) -> Done:
    """The same, if it has a row for every sample and agrees with ours."""
    if done.classes.keys() != keys:
        missing, more = len(keys - done.classes.keys()), len(done.classes.keys() - keys)
        raise SystemExit(f"{name}: of {len(keys)} samples {missing} have no row, and {more} rows have other keys")
    if ours is not None and agreement(ours, done.classes) < AGREEMENT:
        raise SystemExit(f"{name}: top-1 agrees with ours on {agreement(ours, done.classes):.1%} only")
    return done


def against(found: Line, mine: Sequence[Outcome], theirs: Sequence[Outcome]) -> Line:
    """With how many times as fast ours is."""
    return replace(
        found,
        ours_steady=ratio([o.steady for o in mine], [o.steady for o in theirs]),
        ours_whole=ratio([o.whole for o in mine], [o.whole for o in theirs]),
    )


def limit_lines(model: str, limits: Sequence[dict[str, float]], mine: Sequence[Outcome] | None) -> list[Line]:
    decoding = [found["decoding"] for found in limits]
    network = [max(found["network_in_turn"], found["network_streams"]) for found in limits]
    both = [together(*pair) for pair in zip(decoding, network, strict=True)]
    titles = {
        "reading and decoding alone": decoding,
        "the network alone, batch after batch": [found["network_in_turn"] for found in limits],
        "the network alone, a stream per core": [found["network_streams"] for found in limits],
        "both together: 1/(1/D + 1/N)": both,
    }
    return [
        Line(
            *(model, title, "limit", 0, len(limits), median(rates), median(rates) / CORES),
            ours_steady=ratio([outcome.steady for outcome in mine], rates) if mine else None,
        )
        for title, rates in titles.items()
    ]


def show(lines: Sequence[Line]) -> None:
    images = max(line.images for line in lines)
    print(f"\n{lines[0].model}, {images} photographs, {CORES} cores, median of {lines[-1].rounds} rounds; images/s")
    print(f"{'':38} steady  a core   whole  peak MB  top-1   ours/…: steady  whole   first batch, part (s)")
    for found in lines:
        numbers = [
            f"{found.steady:7.1f} {found.steady_per_core:7.1f}",
            cell(found.whole, "8.1f"),
            cell(found.peak_mb, "8,.0f"),
            cell(found.agreement, "7.1%"),
            cell(found.ours_steady, "15.2f"),
            cell(found.ours_whole, "6.2f"),
            cell(found.first_batch, "9.1f"),
            cell(found.first_part, "8.1f"),
        ]
        print(f"{found.arm:38}{' '.join(numbers)}")
    for kind in ("as it comes", "our network"):
        for what in ("steady", "whole"):
            found = best(lines, kind, what)
            if found is not None and found.ours_steady is not None:
                factor = getattr(found, f"ours_{what}")
                print(f"the best peer {'as it comes' if kind == 'as it comes' else 'with our network'}, {what}:"
                      f" {found.arm}; ours is {factor:.2f}×")  # fmt: skip


def cell(value: float | None, form: str) -> str:
    width = int(form.split(".", maxsplit=1)[0].rstrip(","))
    return " " * width if value is None else f"{value:{form}}"


def show_start_up(setting: Setting, rounds: int) -> None:
    """When the first part of a job of small shards is committed, in the time that Ray itself takes to start.

    By chance half of Ray's own starts take a second longer than the others, so that a median of them would be the one
    or the other: the unit is the mean.
    """
    small: Arm = ARMS["ours"]
    tars = "small" if (setting.work / "small").is_dir() else "tars"
    init, first, cached = [], [], []
    for _ in range(rounds):
        shutil.rmtree(setting.cache, ignore_errors=True)
        init += [run_ray_init(setting) for _ in range(RAY_STARTS)]
        first.append(run_arm(small, setting, tars=tars).outcome.first_part or 0.0)
        cached.append(run_arm(small, setting, tars=tars).outcome.first_part or 0.0)
    shards = f"shards of {SMALL}" if tars == "small" else "these shards"
    print(f"\n{setting.model}, {shards}, seconds from the start of the process, mean of {rounds} rounds")
    print(f"ray.init alone                              {mean(init):5.1f}   {min(init):.1f} to {max(init):.1f}")
    for what, seconds in (("the first time", first), ("the converted network cached", cached)):
        print(f"first part, {what:30}  {mean(seconds):5.1f}   {mean(seconds) / mean(init):.2f} × ray.init")


if __name__ == "__main__":
    main()
