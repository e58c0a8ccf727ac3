"""Tars of photographs for the benchmarks, packed once and kept; and the same samples as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Input, Transform
from pipeline.errors import Reject
from pipeline.examples.tars import write_tar
from pipeline.inputs.images import decode, size_and_orientation
from pipeline.inputs.readers import read
from pipeline.inputs.resizing import UPRIGHT
from pipeline.inputs.shards import discover
from pipeline.storage import Store

IMAGES = (".jpg", ".jpeg", ".png")
ROWS = 100  # in a row group


def images_in(folder: Path, suffixes: Sequence[str] = IMAGES) -> list[Path]:
    """In the order of their names. SystemExit where there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes) if folder.is_dir() else []
    if not found:
        raise SystemExit(f"{folder} is no folder with {', '.join(suffixes)} files")
    return found


def refuse_unreadable(listed: Sequence[tuple[str, bytes]]) -> None:
    """SystemExit where an image, key and bytes, cannot be decoded: what is measured would stop there, or differ."""
    for data, key in {data: key for key, data in listed}.items():
        try:
            decode(data, Transform(), Input(url=".").max_pixels)
        except Reject as reject:
            raise SystemExit(f"{key} cannot be read ({reject.message}): take images that can") from None


def refuse_turned(listed: Sequence[tuple[str, bytes]]) -> None:
    """SystemExit where EXIF says that a readable image is to be turned: others show and predict it as it lies."""
    for data, key in {data: key for key, data in listed}.items():
        if size_and_orientation(data)[1] != UPRIGHT:
            raise SystemExit(f"{key} is stored on its side, which its EXIF says and others ignore: take upright images")


def pack(photographs: Path, folder: Path, shards: int, per_shard: int) -> list[Path]:
    """`shards` tars of `per_shard` images each, repeating the photographs as often as needed."""
    files = images_in(photographs)
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


def take_tars(source: Path, folder: Path, images: int) -> list[Path]:
    """Links in `folder` to the first tars of `source`, as many as hold `images` samples or more."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    count = 0
    for path in sorted(source.glob("*.tar")):
        if count >= images:
            break
        held = len(samples(path))
        if held:
            paths.append(folder / path.name)
            paths[-1].symlink_to(path.resolve())
        count += held
    if not paths:
        raise SystemExit(f"the tars in {source} hold no images")
    return paths


def samples(tar: Path) -> list[tuple[str, bytes]]:
    """Key and bytes of every image of a tar."""
    config = Input(url=str(tar))
    (shard,) = discover(config, Store())
    return [(str(sample.key), sample.data) for sample in read(shard, config, Store()) if sample.reject is None]


def as_parquet(tars: list[Path], folder: Path) -> None:
    """One Parquet file per tar with the columns `key` and `bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    for tar in tars:
        keys, data = zip(*samples(tar), strict=True)
        table = pa.table({"key": pa.array(keys, pa.string()), "bytes": pa.array(data, pa.binary())})
        pq.write_table(table, folder / f"{tar.stem}.parquet", row_group_size=ROWS, compression="none")
