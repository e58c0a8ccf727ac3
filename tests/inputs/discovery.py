"""What discovery finds, in the words of its tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.config import Input
from pipeline.inputs.shards import Shard, discover, relative
from pipeline.storage import Store

NO_UTF8 = os.fsdecode(b"caf\xe9")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))


def found(*urls: object, **config: Any) -> list[Shard]:
    return discover(Input(url=[str(url) for url in urls], **config), Store())


def names(shards: list[Shard]) -> set[str]:
    """File names of tars and Parquet files."""
    return {shard.url.rpartition("/")[2] for shard in shards}


def paths(shards: list[Shard]) -> list[str]:
    """The members of all groups, relative to their roots, in order; each must be there once."""
    members = [(shard.root, member.url) for shard in shards for member in shard.members]
    assert len({url for _, url in members}) == len(members), "a file is in two groups"
    return sorted(relative(root, url) for root, url in members)
