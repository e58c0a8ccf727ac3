"""What is found in a shard: of each image its bytes, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import Reject
from pipeline.inputs.shards import printable

MAX_IMAGE_BYTES = 512 * 2**20  # a larger member, value or file is no photograph


Content = bytes | Reject
Items = Iterator[tuple[str | None, Content]]  # key and content of each sample


def broken(error: str, message: str) -> Reject:
    return Reject("read", error, printable(message))


def too_large(size: int) -> Reject | None:
    """The reject of an image of so many bytes, where that is more than an image may have."""
    return broken("member_too_large", f"{size} bytes, more than {MAX_IMAGE_BYTES}") if size > MAX_IMAGE_BYTES else None
