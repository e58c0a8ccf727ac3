"""Tars of photographs for the benchmarks, packed once and kept."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

from pipeline.examples.tars import write_tar

IMAGES = (".jpg", ".jpeg", ".png")


def pack(photographs: Path, folder: Path, shards: int, per_shard: int) -> list[Path]:
    """`shards` tars of `per_shard` images each, repeating the photographs as often as needed."""
    files = sorted(path for path in photographs.iterdir() if path.suffix.lower() in IMAGES)
    if not files:
        raise SystemExit(f"there are no images in {photographs}")
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(cycle(files))
    paths = []
    for shard in range(shards):
        members = [
            (f"{number:06}{path.suffix.lower().replace('.jpeg', '.jpg')}", path.read_bytes())
            for number, path in islice(numbered, per_shard)
        ]
        paths.append(folder / f"photographs-{shard:03}.tar")
        write_tar(paths[-1], members)
    return paths
