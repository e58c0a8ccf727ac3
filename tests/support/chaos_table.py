"""What recorders have written, as it stands in `docs/`: a table by deed for people, and a line for each round.

python -m tests.support.chaos_table chaos-1.jsonl chaos-2.jsonl --rounds docs/chaos-rounds.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = [
    "seed",
    "store",
    "actors",
    "rival",
    "strikes",
    "hits",
    "codes",
    "outcome",
    "seconds",
    "looks",
    "faults",
    "code",
]
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos_table", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--rounds", type=Path, help="where to write a line of CSV for each round")
    options = parser.parse_args()
    lines = [json.loads(text) for path in options.records for text in path.read_text().splitlines()]
    print(summary(lines))
    if options.rounds:
        with options.rounds.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(_row, sorted(lines, key=lambda line: (line["code"], line["seed"]))))


def summary(lines: list[Line]) -> str:
    """A Markdown table: each deed, in how many rounds it was done, how often it hit, and how these rounds ended."""
    rows = ["| deed | rounds | hit | right | not right |", "| --- | --- | --- | --- | --- |"]
    found: dict[str, list[tuple[bool, bool]]] = {}
    for line in lines:
        for deed, hit in _deeds(line):
            found.setdefault(deed, []).append((hit, line["outcome"] == "right"))
    for deed, results in sorted(found.items()):
        right = sum(is_right for _, is_right in results)
        rows.append(
            f"| {deed} | {len(results)} | {sum(hit for hit, _ in results)} | {right} | {len(results) - right} |"
        )
    right = sum(line["outcome"] == "right" for line in lines)
    looks, seconds = sum(line["looks"] for line in lines), sum(line["seconds"].get("all", 0) for line in lines)
    codes = Counter(line["code"] for line in lines)
    rows += [
        "",
        f"{len(lines)} rounds, {right} of them right; {looks:,} looks of the reader; {seconds / len(lines):.0f} s a round.",
        "Code: " + ", ".join(f"{code} ({count})" for code, count in codes.items()),
    ]
    return "\n".join(rows)


def _deeds(line: Line) -> Iterable[tuple[str, bool]]:
    """What was done in this round, and whether it hit; a deed that was done twice counts once."""
    deeds: dict[str, bool] = {}
    hits = line["hits"] or [False] * len(line["plan"])  # a round that the harness could not play has none
    for strike, hit in zip(line["plan"], hits, strict=True):
        deed = f"{strike['victim']}: {strike['deed']}"
        deeds[deed] = deeds.get(deed, False) or hit
    if line["rival"] is not None:
        deeds["driver: a second one at the same time"] = True
    if line["store"] == "s3":
        deeds["S3 with one request in ten going wrong"] = line["faults"] > 0
    return deeds.items()


def _row(line: Line) -> Line:
    """As text; what a run's temporary folder was called says nothing."""
    texts = {
        "rival": "" if line["rival"] is None else f"after {line['rival']} s",
        "strikes": "; ".join(line["strikes"]),
        "hits": " ".join("yes" if hit else "no" for hit in line["hits"]),
        "codes": " ".join(map(str, line["codes"])),
        "outcome": line["outcome"] if line["outcome"] == "right" else "; ".join(line["outcome"])[:500],
        "seconds": line["seconds"].get("all", ""),
    }
    return {name: line[name] for name in COLUMNS} | texts


if __name__ == "__main__":
    main()
