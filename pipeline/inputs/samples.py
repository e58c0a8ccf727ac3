"""What a reader makes of a shard: samples, each the bytes of an image or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import Reject
from pipeline.inputs.shards import printable
from pipeline.rows import Kind, Row

MAX_IMAGE_BYTES = 512 * 2**20  # a larger member, value or file is no photograph


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard: its bytes, or the reason why there are none."""

    index: int
    key: str | None
    data: bytes = b""
    reject: Reject | None = None

    def row(self, shard: int) -> Row:
        """As a row of the `shard`-th shard of a plan."""
        if self.reject is None:
            return Row(shard, Kind.SAMPLE, self.index, self.key, self.data)
        return Row(shard, Kind.ERROR, self.index, self.key, reject=self.reject)


Content = bytes | Reject
Items = Iterator[tuple[str | None, Content]]  # key and content of each sample


def broken(error: str, message: str) -> Reject:
    return Reject("read", error, printable(message))


def too_large(size: int) -> Reject | None:
    """The reject of an image of so many bytes, where that is more than an image may have."""
    return broken("member_too_large", f"{size} bytes, more than {MAX_IMAGE_BYTES}") if size > MAX_IMAGE_BYTES else None
