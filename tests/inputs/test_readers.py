"""Readers: loose files, sources that change, stores that fail; flat memory with every kind of shard."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import AccessDenied, PipelineError, SourceChanged, StoreUnavailable
from pipeline.inputs.readers import read
from pipeline.rows import Row
from pipeline.storage import Store
from tests.inputs.reading import found, parquet, samples, shards_of
from tests.support.tars import header, measure, tar

# --- Loose files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    for name in ("b/2.jpg", "a/1.png", "b.jpg", "a/0.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b/empty.gif").touch()
    return tmp_path


def test_loose_files_in_order_of_their_paths(loose: Path) -> None:
    names = ["a/0.JPG", "a/1.png", "b.jpg", "b/2.jpg"]
    assert found(loose) == [*((name, name.encode()) for name in names), ("b/empty.gif", b"")]


def test_loose_files_that_are_too_large(loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inputs.samples.MAX_IMAGE_BYTES", 5)
    assert dict(found(loose)) == {
        "b.jpg": b"b.jpg",
        "b/empty.gif": b"",
        **dict.fromkeys(("a/0.JPG", "a/1.png", "b/2.jpg"), "member_too_large"),
    }


# --- Sources that change, and stores that fail ---------------------------------------------------------------------


@pytest.fixture(params=["tar", "tgz", "parquet", "files"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """What to list and which file of it will fare badly: the second member of loose files. About 3 MB."""
    folder = tmp_path / "source"
    folder.mkdir()
    noise = np.random.default_rng(0).bytes(3_000_000)
    images = [noise[n * 100_000 : (n + 1) * 100_000] for n in range(30)]
    if request.param == "parquet":
        path = parquet(folder, {"image": images}, use_dictionary=False, write_batch_size=1, data_page_size=1000)
        return path, path
    if request.param == "files":
        for number, image in enumerate(images):
            (folder / f"{number:02}.jpg").write_bytes(image)
        return folder, folder / "01.jpg"
    data = tar(*((f"{number:02}.jpg", image) for number, image in enumerate(images)))
    path = folder / f"a.{request.param}"
    path.write_bytes(gzip.compress(data, 1) if request.param == "tgz" else data)
    return path, path


def test_reading_twice_gives_the_same_samples(source: tuple[Path, Path]) -> None:
    first = samples(source[0])
    assert len(first) == 30
    assert first == samples(source[0])


@pytest.mark.parametrize("what", ["gone", "replaced", "touched"])
def test_source_that_changes_between_plan_and_read(source: tuple[Path, Path], what: str) -> None:
    (shard,), config = shards_of(source[0])
    victim = source[1]
    if what == "gone":
        victim.unlink()
    elif what == "replaced":
        victim.write_bytes(b"another" + victim.read_bytes())
    else:
        os.utime(victim, ns=(0, 0))
    with pytest.raises(SourceChanged, match=victim.name):
        list(read(shard, config, Store()))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_file_that_may_not_be_read(source: tuple[Path, Path]) -> None:
    (shard,), config = shards_of(source[0])
    source[1].chmod(0)
    with unprivileged(), pytest.raises(AccessDenied):
        list(read(shard, config, Store()))


class FailingFile(io.RawIOBase):
    """A file whose store gives up once `after` bytes were read."""

    def __init__(self, file: BinaryIO, after: int, error: PipelineError) -> None:
        self._file, self._left, self._error = file, after, error

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class FailingStore(Store):
    def __init__(self, after: int, error: PipelineError) -> None:
        super().__init__()
        self.left, self.error = after, error

    def open(self, url: str, version: str | None = None, read_ahead: bool = True) -> BinaryIO:
        file = super().open(url, version, read_ahead)
        after, self.left = self.left, self.left - 100_000
        return cast(BinaryIO, FailingFile(file, after, self.error))

    def read(self, url: str, version: str | None = None, limit: int = -1) -> bytes:
        with self.open(url, version) as file:
            return file.read(limit)


@pytest.mark.parametrize("error", [StoreUnavailable("down"), AccessDenied("no"), SourceChanged("new")], ids=repr)
@pytest.mark.parametrize("after", [0, 100_000, 2_500_000])
def test_errors_of_the_store_come_out_as_they_are(source: tuple[Path, Path], after: int, error: PipelineError) -> None:
    """Not as damage: the shard must stay open."""
    (shard,), config = shards_of(source[0])
    before: list[Row] = []
    with pytest.raises(type(error)) as raised:
        before.extend(read(shard, config, FailingStore(after, error)))
    assert raised.value is error
    assert len(before) <= after / 90_000
    assert all(sample.reject is None for sample in before)


# --- Flat memory ---------------------------------------------------------------------------------------------------

COUNT = """
    for path in arguments:
        config = Input(url=path)
        (shard,) = discover(config, Store())
        found = [0, {}]
        for sample in read(shard, config, Store()):
            if sample.reject is None:
                found[0] += 1
            else:
                found[1][sample.reject.error] = found[1].get(sample.reject.error, 0) + 1
        result[path.rpartition("/")[2]] = found
"""


def test_a_large_tar_of_many_members_is_streamed(tmp_path: Path) -> None:
    """25,000 images in 300 MB, all of one sample: neither bytes nor headers nor names pile up."""
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        for number in range(25_000):
            file.write(header(f"video.{number:06}.jpg", 12_000))
            file.seek(12_288, os.SEEK_CUR)  # a hole is zeros
        file.write(bytes(1024))
    result = measure(COUNT, path)
    assert result["large.tar"] == [25_000, {}]
    assert result["peak_mb"] < 8  # 25,000 headers would be 17


def test_a_gzip_bomb_is_read_in_flat_memory(tmp_path: Path) -> None:
    """In an image, in another file, in the attributes of a member, and behind the end."""
    million = gzip.compress(bytes(2**20))

    def bomb(name: str, *pieces: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(gzip.compress(p) if len(p) < 10_000 else p for p in pieces))
        return path

    size = 600 * 2**20
    image, after = header("a.jpg", 3) + b"abc" + bytes(509), header("z.jpg", 3) + b"xyz" + bytes(509 + 1024)
    paths = [
        bomb("image.tgz", image, header("b.jpg", size), million * 600, after),
        bomb("other.tgz", image, header("b.npy", 200 * 2**20), million * 200, after),
        bomb("attributes.tgz", image, header("b.jpg", size, tarfile.XHDTYPE), million * 600, after),
        bomb("behind.tgz", image, bytes(1024), million * 600),
    ]
    result = measure(COUNT, *paths)
    assert result.pop("peak_mb") < 30
    assert result == {
        "image.tgz": [2, {"member_too_large": 1}],
        "other.tgz": [2, {}],
        "attributes.tgz": [1, {"corrupt_shard": 1}],
        "behind.tgz": [1, {}],
    }


def test_one_huge_row_group_is_read_page_by_page(tmp_path: Path) -> None:
    """40,000 images of 10 kB in one row group of 400 MB; pages are of 10 MB, which is what memory follows."""
    count, size = 40_000, 10_000
    offsets = pa.py_buffer(np.arange(count + 1, dtype=np.int32) * size)
    images = pa.Array.from_buffers(pa.binary(), count, [None, offsets, pa.py_buffer(np.zeros(count * size, np.uint8))])
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=count, compression="none", use_dictionary=False)
    assert pq.read_metadata(path).num_row_groups == 1
    result = measure(COUNT, path)
    assert result["large.parquet"] == [count, {}]
    assert result["peak_mb"] < 100
