"""`resnet-batch run`, as it is, with a note of every arrival that its own progress bar is told of."""

from __future__ import annotations

import sys

from benchmarks.peers.arm import note, take_order
from pipeline.cli import main
from pipeline.report import Counter

ORDER = take_order()


def on_rows(counter: Counter, rows: int, errors: int, original=Counter.on_rows) -> None:
    original(counter, rows, errors)
    if rows:
        note(ORDER.times, rows)


if __name__ == "__main__":
    Counter.on_rows = on_rows
    sys.argv[1:] = [
        "run",
        f"input.url={ORDER.folder}/*.tar",
        f"model.name={ORDER.model}",
        f"model.weights={ORDER.weights}",
        f"output.url={ORDER.rows}",
    ]
    main()
