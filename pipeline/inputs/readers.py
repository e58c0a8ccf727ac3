"""A shard's bytes become samples, one after the other, in flat memory and always in the same order.

What is wrong with the data (a truncated tar, a null image) comes out as an error row, at the next
index. What is wrong with the store, or a source that is no longer the planned one, is raised: the shard stays open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.backends import FileInfo
from pipeline.config import Input
from pipeline.errors import NotFound, Reject, SourceChanged
from pipeline.inputs import samples
from pipeline.inputs.parquet import read_parquet
from pipeline.inputs.samples import Content, Items, too_large
from pipeline.inputs.shards import Shard, printable, relative
from pipeline.inputs.tars import read_tar
from pipeline.rows import Kind, Row
from pipeline.storage import Store
from pipeline.urls import is_local

FILES_AHEAD = 16


def read(shard: Shard, config: Input, store: Store, number: int = 0) -> Iterator[Row]:
    """The samples and error rows of the `number`-th shard of a plan, with indices 0..n-1; what is damaged behind them
    is one error row more, without a key.

    Raises StoreUnavailable or AccessDenied when the store does not deliver, SourceChanged when the shard is gone or
    no longer the planned version.
    """
    items = {"webdataset": read_tar, "parquet": read_parquet, "files": _read_files}[shard.kind]
    try:
        for index, (key, content) in enumerate(items(shard, config, store)):
            name = None if key is None else printable(key)
            if isinstance(content, Reject):
                yield Row(number, Kind.ERROR, index, name, reject=content)
            else:
                yield Row(number, Kind.SAMPLE, index, name, content)
        if shard.version and is_local(shard.url) and store.info(shard.url).version != shard.version:
            # An object store refuses to go on with another version. A disk delivers what is written meanwhile.
            raise SourceChanged(f"{shard.url} changed while it was read. The next run takes the new version.")
    except NotFound as gone:
        raise SourceChanged(f"{shard.url} has gone since it was listed: {gone}") from gone


def _read_files(shard: Shard, config: Input, store: Store) -> Items:
    for member, content in _in_order(shard.members, store):
        yield relative(shard.root, member.url), content


def _in_order(members: tuple[FileInfo, ...], store: Store) -> Iterator[tuple[FileInfo, Content]]:
    """Contents in the members' order; from a remote store several are fetched ahead, since each waits for answers."""
    if not members or is_local(members[0].url):
        yield from ((member, _read_file(member, store)) for member in members)
        return
    pending: deque[tuple[FileInfo, Future[Content]]] = deque()
    with ThreadPoolExecutor(FILES_AHEAD) as pool:
        for member in members:
            pending.append((member, pool.submit(_read_file, member, store)))
            if len(pending) >= FILES_AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _read_file(member: FileInfo, store: Store) -> Content:
    if reject := too_large(member.size):
        return reject
    limit = -1 if member.size else samples.MAX_IMAGE_BYTES + 1  # a web server may have named no size
    data = store.read(member.url, member.version, limit)
    return too_large(len(data)) or data
