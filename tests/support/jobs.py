"""Small real jobs: digits in tars, the digits' network, and what a run of them must leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from pipeline.examples.digits import encode_png, load_digits_images
from pipeline.examples.tars import write_tar

NETWORK = "pipeline.examples.network:digits_resnet20"
# Sections of a job that computes nothing.
NOOP = {"model": {"name": "resnet18", "weights": "random"}, "runtime": {"engine": "noop", "batch_size": 8}}
WEIGHTS = str(files("pipeline.examples") / "digits_resnet20.safetensors")
TRANSFORM = {"resize": 32, "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3}
BROKEN = b"\xff\xd8\xff\xe0 this is no JPEG"


def digits_tars(folder: Path, shards: int, per_shard: int, broken: Sequence[int] = (), scale: int = 1) -> list[Path]:
    """Tars of consecutive digits; in each, the images at the places in `broken` are not readable.

    With `scale`, every pixel becomes a square of that side, so that decoding takes its time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits_images()
    pngs = [
        encode_png(np.kron(image, np.ones((scale, scale), np.uint8))) for image in digits.images[: shards * per_shard]
    ]
    paths = []
    for shard in range(shards):
        members = []
        for place in range(per_shard):
            number = shard * per_shard + place
            members.append((f"{digits.keys[number]}.png", BROKEN if place in broken else pngs[number]))
            members.append((f"{digits.keys[number]}.cls", str(digits.labels[number]).encode()))
        paths.append(folder / f"digits-{shard:03}.tar")
        write_tar(paths[-1], members)
    return paths


def digits_config(input_url: str | Path, output_url: str | Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config that labels digits; `sections` are merged in."""
    config: dict[str, Any] = {
        "input": {"url": str(input_url)},
        "model": {"name": NETWORK, "weights": WEIGHTS, "transform": TRANSFORM},
        "output": {"url": str(output_url)},
        "runtime": {"engine": "openvino", "batch_size": 16},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return config


def rows(url: str | Path, errors: bool = False) -> pa.Table:
    """All rows or error rows, sorted by identity."""
    table = pipeline.read(str(url), errors=errors)
    return table.sort_by([("shard", "ascending"), ("index", "ascending")])


def assert_exactly_once(url: str | Path, expected: int) -> None:
    """The one home of the promise: every listed sample is one row or one error row, and the ledger says the same."""
    identities = Counter(
        (row["shard"], row["index"]) for table in (rows(url), rows(url, errors=True)) for row in table.to_pylist()
    )
    assert sum(identities.values()) == expected
    assert set(identities.values()) == {1}
    found = pipeline.verify(str(url))
    assert found.ok, str(found)
    assert found.predicted + found.errors == expected


def assert_no_leftovers(folder: Path) -> None:
    """Only what the layout names stands in a local dataset."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = name.split("/")[0] in {"_dataset.json", "README.md", "data", "errors", "_ledger", "_model", "_runs"}
        assert known, name
        assert not path.name.startswith("."), name
    for path in (folder / "data").glob("*"):
        pq.ParquetFile(path).close()
