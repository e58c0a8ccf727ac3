"""Odd shards beyond test_tars.py and test_parquet.py, and sources that change while they are read: docs/odd-inputs.md is the table."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from pipeline import remote
from pipeline.config import Input, Storage
from pipeline.errors import SourceChanged
from pipeline.inputs import parquet
from pipeline.inputs.readers import read
from pipeline.inputs.shards import current_fingerprint, discover
from pipeline.inputs.stream import read_rows
from pipeline.rows import Kind
from pipeline.storage import Store
from tests.inputs.reading import found, samples
from tests.support.s3 import S3Server, s3_server
from tests.support.tars import REPOSITORY, header, member, tar

# --- What is no tar ------------------------------------------------------------------------------------------------


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "Zstandard"),
        (lambda data: b"\x04\x22\x4d\x18" + data, "LZ4"),
        (zipped, "a zip archive"),
        (lambda data: b"PAR1" + data, "Parquet"),
        (lambda data: b"<html>403</html>", "XML or HTML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_archive_under_a_tars_name_is_told_by_its_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    (tmp_path / "a.tar").write_bytes(pack(tar(("a.jpg", np.random.default_rng(0).bytes(5000)))))
    (sample,) = samples(tmp_path / "a.tar")
    assert sample.reject is not None
    assert sample.reject.error == "corrupt_shard"
    assert sample.reject.message == f"this is {name}; tars are read plain or compressed by gzip"


def test_a_member_may_be_named_like_another_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("BZh.jpg", b"1"), ("PK\3\4.jpg", b"2"))[:2048])
    assert found(tmp_path / "a.tar") == [("BZh", b"1"), ("PK\3\4", b"2"), (None, "truncated_shard")]


# --- Odd tars ------------------------------------------------------------------------------------------------------


def test_members_in_any_order(tmp_path: Path) -> None:
    """What belongs to a sample may lie anywhere: only images count, in the order in which they come."""
    members = [("b.json", b"{}"), ("c.jpg", b"3"), ("a.jpg", b"1"), ("b.jpg", b"2"), ("c.cls", b"7"), ("a.txt", b"")]
    (tmp_path / "a.tar").write_bytes(tar(*members))
    assert found(tmp_path / "a.tar") == [("c", b"3"), ("a", b"1"), ("b", b"2")]


def test_a_tar_in_a_tar_is_no_image_and_stays_packed(tmp_path: Path) -> None:
    inner = tar(("inner.jpg", b"hidden"))
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", b"1"), ("b.tar", inner), ("c.jpg", inner)))
    assert found(tmp_path / "a.tar") == [("a", b"1"), ("c", inner)]


def old_gnu_sparse(name: str, extensions: int) -> bytes:
    block = bytearray(header(name, 512, tarfile.GNUTYPE_SPARSE))
    block[257:265] = tarfile.GNU_MAGIC
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[482] = extensions > 0
    block[483:495] = b"%011o\0" % 10**9  # what it would unfold to
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]  # type: ignore[attr-defined]
    more = [bytes(504) + bytes([left > 0]) + bytes(7) for left in reversed(range(extensions))]
    return bytes(block) + b"".join(more) + bytes(512)


def pax_sparse(**headers: str) -> tarfile.TarInfo:
    return member("s.jpg", 512, **{f"GNU.sparse.{name.replace('_', '.')}": value for name, value in headers.items()})


@pytest.mark.parametrize(
    "sparse",
    [
        old_gnu_sparse("s.jpg", 0),
        old_gnu_sparse("s.jpg", 3),
        tar((pax_sparse(size="1000000", numblocks="1", offset="0", numbytes="512"), bytes(512)))[:2048],
        tar((pax_sparse(size="1000000", numblocks="1", map="0,512"), bytes(512)))[:2048],
        tar((pax_sparse(major="1", minor="0", realsize="1000000", name="s.jpg"), b"1\n0\n1\n" + bytes(506)))[:2048],
    ],
    ids=["old", "old, extended", "0.0", "0.1", "1.0"],
)
def test_sparse_files_of_every_kind_are_error_rows(tmp_path: Path, sparse: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(sparse + tar(("b.jpg", b"2")))
    assert found(tmp_path / "a.tar") == [("s", "not_a_regular_member"), ("b", b"2")]


@pytest.mark.parametrize("cut", [512, 600, 1536])
def test_a_sparse_header_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", b"1"))[:1024] + old_gnu_sparse("s.jpg", 3)[:cut])
    assert found(tmp_path / "a.tar") == [("a", b"1"), (None, "truncated_shard")]


def test_a_sparse_file_may_unfold_to_any_size(tmp_path: Path) -> None:
    sparse = tar((pax_sparse(major="1", minor="0", realsize=str(2**44), name="s.jpg"), b"1\n0\n1\n" + bytes(506)))
    (tmp_path / "a.tar").write_bytes(sparse[:2048] + tar(("b.jpg", b"2")))
    assert found(tmp_path / "a.tar") == [("s", "not_a_regular_member"), ("b", b"2")]


@pytest.mark.parametrize(
    "record",
    [
        *(b"999999999999 path=x\n", b"30 path=x\n", b"9 path=ab\n", b"0 path=x\n", b"-9 path=x\n", b"path=x\n"),
        *(b"x path=y\n", b"12 path=ab", b"9 pathab\n", b" ", b"11 path=x\n\n7 path=y\n"),
    ],
)
def test_damaged_attributes_are_damage(tmp_path: Path, record: bytes) -> None:
    """What Python made of them depends on its version: often another name, under which an image is none."""
    attributes = header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", b"1"))[:1024] + attributes + tar(("b.jpg", b"2")))
    assert found(tmp_path / "a.tar") == [("a", b"1"), (None, "corrupt_shard")]


def test_attributes_of_every_length(tmp_path: Path) -> None:
    """Of one block and of several, with newlines, and empty."""
    for value in ("", "a\nb=c\n9 path=x", *("x" * length for length in (490, 498, 499, 500, 512, 5000))):
        image = member("a.jpg", 1, comment=value, path="ü.jpg")
        (tmp_path / "a.tar").write_bytes(tar((image, b"1"), ("b.jpg", b"2")))
        assert found(tmp_path / "a.tar") == [("ü", b"1"), ("b", b"2")]


def test_a_link_with_bytes_of_its_own_does_not_shift_what_follows(tmp_path: Path) -> None:
    """tarfile reads no content behind a link, whatever its size says; the next header then is not where it would be."""
    link = member("l.jpg", 512, tarfile.SYMTYPE, "/etc/passwd").tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(link + tar(("b.jpg", b"2")))
    assert found(tmp_path / "a.tar") == [("l", "not_a_regular_member"), ("b", b"2")]


# --- Odd Parquet files ---------------------------------------------------------------------------------------------


class OpenKeys(pe.KmsClient):
    """Keys that lie open beside what they lock: enough to write a file that we have no key to."""

    def __init__(self, _: Any) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return base64.b64encode(key_bytes).decode()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize("plain_footer", [True, False])
def test_an_encrypted_parquet_file_is_an_error_row(tmp_path: Path, plain_footer: bool) -> None:
    locked = pe.EncryptionConfiguration(footer_key="f", column_keys={"c": ["image"]}, plaintext_footer=plain_footer)
    properties = pe.CryptoFactory(OpenKeys).file_encryption_properties(pe.KmsConnectionConfig(), locked)
    table = pa.table({"image": [b"1", b"2"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    (sample,) = samples(tmp_path / "a.parquet")
    assert sample.reject is not None
    assert sample.reject.error == "corrupt_shard"
    assert "crypt" in sample.reject.message


def test_no_row_groups(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("image", pa.binary())])):
        pass
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 0
    assert found(tmp_path / "a.parquet") == []


@pytest.mark.parametrize(
    "image",
    [
        pa.array([[b"1"]]),
        pa.array([{"deep": {"bytes": b"1"}}]),
        pa.array([[("a", b"1")]], pa.map_(pa.string(), pa.binary())),
        pa.array([[b"1"]], pa.list_(pa.binary(), 1)),
    ],
    ids=["list", "struct in a struct", "map", "list of one"],
)
def test_images_that_lie_deeper_are_not_guessed_at(tmp_path: Path, image: pa.Array) -> None:
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet") == [(None, "missing_column")]


# --- Sources that change while they are read -----------------------------------------------------------------------

NOISE = np.random.default_rng(0).bytes(3_000_000)
PICTURES = [NOISE[n * 100_000 : (n + 1) * 100_000] for n in range(30)]
OTHER = [bytes(reversed(picture)) for picture in PICTURES]


def packed(kind: str, pictures: list[bytes]) -> bytes:
    if kind == "parquet":
        buffer = io.BytesIO()
        pages = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 1000, "compression": "none"}
        pq.write_table(pa.table({"image": pictures}), buffer, **pages)
        return buffer.getvalue()
    data = tar(*((f"{number:02}.jpg", picture) for number, picture in enumerate(pictures)))
    return gzip.compress(data, 1) if kind == "tar.gz" else data


def replace(path: Path, kind: str) -> None:
    path.with_name("new").write_bytes(packed(kind, OTHER))
    path.with_name("new").rename(path)


def overwrite(path: Path, kind: str) -> None:
    with path.open("r+b") as file:
        file.write(packed(kind, OTHER))


def cut(path: Path, kind: str) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path, kind: str) -> None:
    with path.open("ab") as file:
        file.write(bytes(1024))


def remove(path: Path, kind: str) -> None:
    path.unlink()


CHANGES = [replace, overwrite, cut, append, remove]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("after", [1, 30], ids=["begun", "all but ended"])
def test_a_local_shard_that_changes_while_it_is_read_stays_open(
    tmp_path: Path, kind: str, change: Callable[[Path, str], None], after: int
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed(kind, PICTURES))
    config, store = Input(url=str(path)), Store()
    (shard,) = discover(config, store)
    rows = read_rows(0, shard, config, store)
    before = [next(rows) for _ in range(after)]
    assert [row.data for row in before] == PICTURES[:after]
    change(path, kind)
    last = list(rows)[-1]
    assert last.kind is Kind.ABANDONED
    assert last.reject is not None
    assert last.reject.error == "SourceChanged"
    if change is not remove:  # and were it not: the commit looks again, and finds another fingerprint
        assert current_fingerprint(shard, store) != shard.fingerprint


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("change", ["put", "delete"])
def test_bytes_of_two_versions_never_mix_on_s3(
    s3: S3Server, kind: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 200_000)
    monkeypatch.setattr(parquet, "PARQUET_BUFFER", 200_000)
    s3.become(monkeypatch, s3.owner)
    client, key = s3.client(s3.owner), f"{change}.{kind}"
    client.put_object(Bucket="raw", Key=key, Body=packed(kind, PICTURES))
    store, config = Store(Storage(endpoint_url=s3.endpoint_url)), Input(url=f"s3://raw/{key}")
    (shard,) = discover(config, store)
    delivered = []

    def consume() -> None:
        for sample in read(shard, config, store):
            assert sample.reject is None, sample.reject
            delivered.append(sample.data)
            if len(delivered) == 5 and change == "put":
                client.put_object(Bucket="raw", Key=key, Body=packed(kind, OTHER))
            elif len(delivered) == 5:
                client.delete_object(Bucket="raw", Key=key)

    with pytest.raises(SourceChanged):
        consume()
    assert 5 <= len(delivered) < 30
    assert delivered == PICTURES[: len(delivered)]


def test_the_tables_of_odd_inputs_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs/odd-inputs.md").read_text()))
    there = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 40
    assert named <= there, named - there
