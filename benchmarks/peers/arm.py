"""What every arm of `compare` shares: its command line, and how it says when which images were done."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Order:
    """What an arm is to do: classify all of `folder` with `weights`, and leave Parquet with the columns `key` and
    `class_id` in `output`/rows, and a line for every batch done in `output`/times."""

    folder: Path  # tars, or Parquet with the columns `key` and `bytes`
    weights: Path
    output: Path
    model: str
    network: str  # eager or openvino
    batch_size: int
    threads: int  # of the network where Ray decides otherwise; 0: as Ray has it

    @property
    def rows(self) -> Path:
        return self.output / "rows"

    @property
    def times(self) -> str:
        return str(self.output / "times")


def take_order(batch_size: int = 32) -> Order:
    """The order on this process's command line; with that batch size unless it names another."""
    parser = argparse.ArgumentParser()
    for name in ("folder", "weights", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--network", choices=["eager", "openvino"], default="eager")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=0)
    return Order(**vars(parser.parse_args()))


def note(times: str, images: int) -> None:
    """That so many images more are done, at this moment."""
    handle = os.open(times, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, (json.dumps([time.time(), images]) + "\n").encode())
    os.close(handle)
