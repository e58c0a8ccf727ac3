"""Readers: what each kind of shard yields, whole or damaged, and that it does so in flat memory."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Input
from pipeline.errors import AccessDenied, PipelineError, SourceChanged, StoreUnavailable
from pipeline.inputs import readers
from pipeline.inputs.readers import Sample, read
from pipeline.inputs.shards import Shard, discover
from pipeline.storage import Store
from tests.support.tars import header, measure, member, tar

Found = list[tuple[str | None, bytes | str]]  # key, and the bytes or the error class


def shards_of(path: Path, **config: Any) -> tuple[list[Shard], Input]:
    settings = Input(url=str(path), **config)
    return discover(settings, Store()), settings


def samples(path: Path, store: Store | None = None, **config: Any) -> list[Sample]:
    """The samples of the only shard; their indices must be 0..n-1, and only the last may lack a key."""
    (shard,), settings = shards_of(path, **config)
    result = list(read(shard, settings, store or Store()))
    assert [sample.index for sample in result] == list(range(len(result)))
    assert all(sample.key is not None for sample in result[:-1])
    return result


def found(path: Path, **config: Any) -> Found:
    return [(s.key, s.data if s.reject is None else s.reject.error) for s in samples(path, **config)]


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Found]:
    """`packed(("a.jpg", b"…"), …)`: what is read from a tar of these members; `packed(b"…")`: of these bytes."""

    def pack(*members: Any, name: str = "shard.tar", kind: int = tarfile.PAX_FORMAT) -> Found:
        data = members[0] if members and isinstance(members[0], bytes) else tar(*members, kind=kind)
        (tmp_path / name).write_bytes(data)
        return found(tmp_path / name, format="webdataset")

    return pack


Pack = Callable[..., Found]

# --- Tars: samples and keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TAR.GZ", "gzip-under-another-name.tar", "shard"])
def test_tars_plain_and_compressed(packed: Pack, name: str) -> None:
    data = tar(("a.jpg", b"1"), ("b.png", b"22"))
    is_gzip = "gz" in name.lower()
    assert packed(gzip.compress(data) if is_gzip else data, name=name) == [("a", b"1"), ("b", b"22")]


@pytest.mark.parametrize(
    "suffix", ["jpg", "JPG", "jpeg", "JpEg", "png", "gif", "webp", "bmp", "tif", "TIFF", "avif", "heic", "jxl", "ppm"]
)
def test_any_image_extension(packed: Pack, suffix: str) -> None:
    assert packed((f"a.{suffix}", b"x")) == [("a", b"x")]


def test_other_files_of_a_sample_are_passed_over(packed: Pack) -> None:
    members = [("a.cls", b"7"), ("a.jpg", b"A"), ("a.json", b"{}"), ("b.txt", b"?"), ("c.jpg", b"C"), ("c.npy", b"0")]
    assert packed(*members) == [("a", b"A"), ("c", b"C")]


def test_images_that_share_a_sample_go_by_their_own_names(packed: Pack) -> None:
    members = [("a.jpg", b"1"), ("b.left.png", b"2"), ("b.json", b"{}"), ("b.right.png", b"3"), ("c.jpg", b"4")]
    assert packed(*members) == [("a", b"1"), ("b.left.png", b"2"), ("b.right.png", b"3"), ("c", b"4")]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dir.v1/a.b.seg.png", "dir.v1/a"),
        ("a.b.jpg", "a"),
        ("./x/a.jpg", "./x/a"),
        ("x/y z/ü 日.jpg", "x/y z/ü 日"),
        ("x//a.jpg", "x//a"),
        ("line\nbreak.jpg", "line\nbreak"),
    ],
)
def test_keys_follow_the_webdataset_convention(packed: Pack, name: str, key: str) -> None:
    assert packed((name, b"x")) == [(key, b"x")]


def test_members_without_a_key_or_an_image_are_no_samples(packed: Pack) -> None:
    """A name that begins with a dot has no key; macOS adds such files (`._a.jpg`) to every tar."""
    assert packed(*((name, b"x") for name in ("jpg", ".jpg", "d/._a.jpg", "a.jpg.txt", "jpg/readme", "a."))) == []


def test_duplicate_keys_are_all_kept(packed: Pack) -> None:
    assert packed(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")) == [("a", b"1"), ("b", b"2"), ("a", b"3")]
    assert packed(("a.jpg", b"1"), ("a.jpg", b"2")) == [("a.jpg", b"1"), ("a.jpg", b"2")]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_every_dialect(packed: Pack, kind: int) -> None:
    deep = "/".join(["d" * 40] * 3) + "/" + "n" * 60
    raw = os.fsdecode(b"caf\xe9")
    assert packed((f"{deep}.jpg", b"1"), (f"{raw}.jpg", b"2"), kind=kind) == [(deep, b"1"), (r"caf\udce9", b"2")]


def test_names_of_any_length(packed: Pack) -> None:
    name = "x" * 5000
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert packed((f"{name}.jpg", b"1"), ("b.jpg", b"2"), kind=kind) == [(name, b"1"), ("b", b"2")]


def test_pax_headers_of_a_member_and_of_all(packed: Pack) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "ü"}) as archive:
        archive.addfile(member("a.jpg", 1, path="b.jpg", mtime="1.5"), io.BytesIO(b"1"))
    assert packed(buffer.getvalue()) == [("b", b"1")]


# --- Tars: members that are no plain files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"],
    ids=["hard link", "symlink", "character device", "block device", "pipe", "unknown"],
)
def test_members_that_are_no_files_are_error_rows(packed: Pack, tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_bytes(b"not ours")
    odd = member("odd.jpg", kind=kind, link=str(tmp_path / "secret"))
    inside = member("inside.jpg", kind=kind, link="a.jpg")
    assert packed(("a.jpg", b"1"), odd, inside, ("b.jpg", b"2")) == [
        ("a", b"1"),
        ("odd", "not_a_regular_member"),
        ("inside", "not_a_regular_member"),
        ("b", b"2"),
    ]


def test_links_that_are_no_images_and_directories_are_passed_over(packed: Pack) -> None:
    others = [
        member("d.jpg", kind=tarfile.DIRTYPE),
        member("d.jpg/", kind=tarfile.AREGTYPE),
        member("latest", link="a"),
    ]
    assert packed(*others, ("d.jpg/a.jpg", b"1")) == [("d.jpg/a", b"1")]


def test_sparse_members_are_error_rows(packed: Pack) -> None:
    gnu = bytearray(header("a.jpg", 512, tarfile.GNUTYPE_SPARSE))
    gnu[257:265] = tarfile.GNU_MAGIC
    gnu[386:410] = b"%011o\0%011o\0" % (0, 512)
    gnu[483:495] = b"%011o\0" % 10**9  # what it would unfold to
    gnu[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(gnu))[0]
    pax = member("b.jpg", 512, **{"GNU.sparse.map": "0,512", "GNU.sparse.size": "1000000000"})
    rest = tar((pax, bytes(512)), ("c.jpg", b"3"))
    expected = [("a", "not_a_regular_member"), ("b", "not_a_regular_member"), ("c", b"3")]
    assert packed(bytes(gnu) + bytes(512) + rest) == expected


def test_names_are_never_paths(packed: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    names = [f"{tmp_path}/absolute.jpg", "../up.jpg", "a/../../up.jpg", "~/home.jpg", "C:\\x\\y.jpg", "s3://b/c.jpg"]
    expected = [(name.removesuffix(".jpg"), b"x") for name in names]
    expected[2] = ("a/../../up", b"x")
    assert packed(*((name, b"x") for name in names)) == expected
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["shard.tar", "work"]


def test_members_that_are_too_large_are_error_rows(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_IMAGE_BYTES", 1000)
    data = tar(("a.jpg", bytes(1000)), ("b.jpg", bytes(1001)), ("b.json", bytes(5000)), ("c.jpg", b"3"))
    for name, content in {"shard.tar": data, "shard.tgz": gzip.compress(data)}.items():
        assert packed(content, name=name) == [("a", bytes(1000)), ("b", "member_too_large"), ("c", b"3")]


# --- Tars: damage --------------------------------------------------------------------------------------------------

MEMBERS = [("a.jpg", b"A" * 700), ("a.json", b"{}"), ("b.jpg", b"B" * 512), ("b" * 120 + ".jpg", b"C" * 1500)]
IMAGES: Found = [("a", b"A" * 700), ("b", b"B" * 512), ("b" * 120, b"C" * 1500)]


@pytest.fixture(scope="module")
def whole() -> bytes:
    """Up to the end marker's two blocks, without more padding."""
    data = tar(*MEMBERS, kind=tarfile.GNU_FORMAT)
    return data[: ends(data)[-1] + -ends(data)[-1] % 512 + 1024]


def ends(data: bytes) -> list[int]:
    """Where the content of each image ends."""
    return [data.rindex(content) + len(content) for _, content in IMAGES if isinstance(content, bytes)]


def test_tar_cut_off_anywhere_keeps_what_came_before(whole: bytes, packed: Pack) -> None:
    """In a header, in data, in padding, at a member's border, before or in the end marker."""
    marker = len(whole) - 1024
    borders = {place + step for place in [*range(0, len(whole), 512), *ends(whole)] for step in (-1, 0, 1)}
    for cut in sorted((borders | set(range(0, len(whole), 61))) & set(range(len(whole)))):
        kept = [image for image, end in zip(IMAGES, ends(whole), strict=True) if end <= cut]
        damage: Found = [] if cut >= marker + 512 else [(None, "truncated_shard")]
        assert packed(whole[:cut]) == kept + damage, f"cut at {cut}"


def test_compressed_tar_cut_off_anywhere_keeps_what_came_before(packed: Pack) -> None:
    noise = np.random.default_rng(0).bytes(3000)
    data = gzip.compress(tar(("a.jpg", noise[:1000]), ("b.jpg", noise[1000:])))
    full: Found = [("a", noise[:1000]), ("b", noise[1000:])]
    assert packed(data) == full
    counts = []
    for cut in [*range(2, len(data) - 20, 17), *range(len(data) - 20, len(data))]:  # two bytes tell gzip from tar
        *kept, damage = packed(data[:cut])
        assert damage == (None, "truncated_shard"), f"cut at {cut}"
        assert kept == full[: len(kept)]
        counts.append(len(kept))
    assert counts == sorted(counts)
    assert counts[-1] == 2


def test_damaged_header_ends_a_tar(whole: bytes, packed: Pack) -> None:
    damaged = bytearray(whole)
    damaged[damaged.index(b"b.jpg")] ^= 1
    assert packed(bytes(damaged)) == [IMAGES[0], (None, "corrupt_shard")]


@pytest.mark.parametrize("at", [-8, -1], ids=["checksum", "length"])
def test_gzip_checksum_is_compared(packed: Pack, at: int) -> None:
    data = bytearray(gzip.compress(tar(("a.jpg", b"1"))))
    data[at] ^= 1
    assert packed(bytes(data)) == [("a", b"1"), (None, "corrupt_shard")]


@pytest.mark.parametrize("rest", [b"this is not gzip", gzip.compress(b"")[:10] + b"\xff" * 10], ids=["header", "data"])
def test_damage_in_a_compressed_stream(packed: Pack, rest: bytes) -> None:
    data = tar(("a.jpg", b"1"), ("b.jpg", b"2"))
    assert packed(gzip.compress(data[:1100]) + rest + bytes(100)) == [("a", b"1"), (None, "corrupt_shard")]


def test_gzip_in_several_members_and_with_padding(packed: Pack) -> None:
    data = tar(("a.jpg", b"1"), ("b.jpg", b"2"))
    assert packed(gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(100)) == [("a", b"1"), ("b", b"2")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [(None, "truncated_shard")]),
        (b"\x1f\x8b", [(None, "truncated_shard")]),
        (gzip.compress(b""), [(None, "truncated_shard")]),
        (b"403 Forbidden", [(None, "truncated_shard")]),
        (b"<html>403 Forbidden</html>", [(None, "corrupt_shard")]),
        (b"<html>" * 1000, [(None, "corrupt_shard")]),
        (np.random.default_rng(0).bytes(10_000), [(None, "corrupt_shard")]),
        (bytes(1024), []),
        (bytes(10_240), []),
        (gzip.compress(bytes(1024)), []),
        (tar(("readme.txt", b"no images"), ("a.cls", b"1")), []),
    ],
    ids=[
        "0-bytes",
        "gz-magic",
        "gz-empty",
        "short",
        "short-html",
        "html",
        "noise",
        "end-marker",
        "padded",
        "gz-end-marker",
        "no-images",
    ],
)
def test_tars_that_hold_nothing(packed: Pack, content: bytes, expected: Found) -> None:
    assert packed(content) == expected


def test_what_stands_behind_the_end_marker_is_not_read(packed: Pack) -> None:
    """As tar and webdataset have it."""
    assert packed(tar(("a.jpg", b"1")) + tar(("b.jpg", b"2"))) == [("a", b"1")]


@pytest.mark.parametrize(
    "block",
    [
        header("a.jpg", kind=tarfile.XHDTYPE, size=2**30),
        header("a.jpg", kind=tarfile.GNUTYPE_LONGNAME, size=2**30),
        b"".join(header("x", kind=tarfile.XGLTYPE) for _ in range(5000)),
    ],
    ids=["attributes", "name", "endless chain"],
)
def test_headers_that_ask_for_too_much_are_damage(packed: Pack, block: bytes) -> None:
    assert packed(tar(("a.jpg", b"1"))[:1024] + block + bytes(4096)) == [("a", b"1"), (None, "corrupt_shard")]


@pytest.mark.parametrize("name", ["b.jpg", "b.txt"])
@pytest.mark.parametrize("size", [-512, -1024, -1536, -(10**9)])  # the third points to the tar's beginning
def test_negative_sizes_are_damage_and_no_loop(packed: Pack, name: str, size: int) -> None:
    lie = bytearray(header(name))
    lie[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    lie[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(lie))[0]  # type: ignore[attr-defined]
    assert packed(tar(("a.jpg", b"1"))[:1024] + bytes(lie) + bytes(4096)) == [("a", b"1"), (None, "corrupt_shard")]


changes = st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(changes, st.booleans(), st.integers(0, 6000))
def test_any_bytes_are_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], is_gzip: bool, length: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    sparse = member("s.jpg", 512, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    data = tar(*MEMBERS, (sparse, b"1\n0\n1\n" + bytes(506)), ("z.jpg", b"z"))[: 1000 + length]
    damaged = bytearray(gzip.compress(data, 0) if is_gzip else data)
    for place, new in changes:
        damaged[place : place + len(new)] = new
    path.write_bytes(damaged)
    result = samples(path)  # checks indices and keys
    first = min(place for place, _ in changes)
    if not is_gzip and first >= 3584 and length >= 3584:
        assert [(s.key, s.data) for s in result[:2]] == IMAGES[:2]


# --- Parquet -------------------------------------------------------------------------------------------------------

JPEGS = [b"first", b"second one", b""]
PATHS = ["x/1.jpg", None, "3.jpg"]


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int8(), pa.large_binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("as_arrow", [True, False])
def test_columns_of_bytes(tmp_path: Path, kind: pa.DataType, as_arrow: bool) -> None:
    values = pa.array([*JPEGS, None, *JPEGS], pa.binary())
    values = values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)
    path = parquet(tmp_path, {"label": list(range(7)), "image": values}, store_schema=as_arrow)
    names = list(enumerate([*JPEGS, "null_image", *JPEGS]))
    assert found(path) == [(str(row), content) for row, content in names]


def test_fixed_size_bytes_count_where_there_is_nothing_else_or_they_are_named(tmp_path: Path) -> None:
    hashes = pa.array([b"12", b"34"], pa.binary(2))
    path = parquet(tmp_path, {"hash": hashes})
    assert found(path) == [("0", b"12"), ("1", b"34")]
    path = parquet(tmp_path, {"hash": hashes, "image": [b"a", b"b"]})
    assert found(path) == [("0", b"a"), ("1", b"b")]
    assert found(path, image="hash") == [("0", b"12"), ("1", b"34")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_struct_of_bytes_and_path(tmp_path: Path, kind: pa.DataType) -> None:
    structs = [{"bytes": data, "path": path, "more": 1} for data, path in zip(JPEGS, PATHS, strict=True)]
    image = pa.array([*structs, None], pa.struct({"path": pa.string(), "bytes": kind, "more": pa.int8()}))
    path = parquet(tmp_path, {"image": image, "label": [0, 1, 2, 3]})
    assert found(path) == [("x/1.jpg", b"first"), ("1", b"second one"), ("3.jpg", b""), ("3", "null_image")]


def test_struct_without_path(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"image": pa.array([{"bytes": b"1"}], pa.struct({"bytes": pa.binary()}))})
    assert found(path) == [("0", b"1")]


def test_images_as_datasets_writes_them(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [picture, {"bytes": b"2", "path": "2.png"}, None], "label": [0, 1, 2]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (first_key, first), *others = found(path)
    assert isinstance(first, bytes)
    assert (first_key, Image.open(io.BytesIO(first)).getpixel((0, 0))) == ("0", (255, 0, 0))
    assert others == [("2.png", b"2"), ("2", "null_image")]


def test_a_path_without_bytes_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"on the disk")
    image = pa.array([{"bytes": None, "path": str(tmp_path / "1.png")}])
    path = parquet(tmp_path, {"image": image.cast(pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    assert found(path) == [(str(tmp_path / "1.png"), "null_image")]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (["a", None, "ü"], ["a", "1", "ü"]),
        ([7, 8, 9], ["7", "8", "9"]),
        (pa.array([1, None, 300], pa.uint16()), ["1", "1", "300"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"\xff", b""]), ["a", r"\xff", ""]),
        (pa.array(["a", "b", "c"], pa.string_view()), ["a", "b", "c"]),
        (pa.array([0, 1, 2], pa.timestamp("ns")), [f"1970-01-01 00:00:00.00000000{n}" for n in range(3)]),
    ],
    ids=["text", "number", "small", "dictionary", "bytes", "view", "time"],
)
def test_key_column(tmp_path: Path, values: Any, keys: list[str]) -> None:
    path = parquet(tmp_path, {"id": values, "image": pa.array(JPEGS, pa.large_binary())})
    assert [key for key, _ in found(path, image="image", key="id")] == keys


def test_texts_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff/")])
    path = parquet(tmp_path, {"image": [b"1"], "id": raw})
    assert found(path, key="id") == [(r"a\xff/", b"1")]


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"label": [1], "text": ["x"]}, {}, r"no column holds bytes.*label \(int64\), text \(string\)"),
        ({"a": [b"1"], "b": [b"2"]}, {}, r"several columns hold bytes.*a \(binary\), b \(binary\)"),
        ({"a": [b"1"], "b": [b"2"]}, {"image": "c"}, r"input.image=c is not .* a \(binary\), b \(binary\)"),
        ({"a": ["text"]}, {"image": "a"}, r"input.image=a is not one column of bytes among a \(string\)"),
        ({"a": [[b"1"]]}, {}, r"no column holds bytes.* a \(list<"),
        ({"a": [b"1"]}, {"key": "id"}, r"input.key=id is not .* a \(binary\)"),
        ({"a": [b"1"], "id": [[1]]}, {"key": "id"}, r"input.key=id is not .* id \(list<"),
    ],
)
def test_missing_columns_are_one_error_row_that_lists_what_is_there(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    (sample,) = samples(parquet(tmp_path, columns), **config)
    assert sample.key is None
    assert sample.reject is not None
    assert sample.reject.error == "missing_column"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(sample.reject.message)


def test_columns_of_one_name_are_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([b"1"]), pa.array([1])], ["image", "image"]), path)
    assert found(path) == [(None, "missing_column")]


def test_no_rows(tmp_path: Path) -> None:
    assert found(parquet(tmp_path, {"image": pa.array([], pa.binary())})) == []
    assert found(parquet(tmp_path, {"image": pa.array([], pa.string())})) == [(None, "missing_column")]


def test_values_that_are_too_large_are_error_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_IMAGE_BYTES", 10)
    path = parquet(tmp_path, {"image": [b"x" * 10, b"x" * 11, b"y"]})
    assert found(path) == [("0", b"x" * 10), ("1", "member_too_large"), ("2", b"y")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Parquet file of three row groups of 100 rows, each of four pages with checksums."""
    noise = np.random.default_rng(0).bytes(300 * 500)
    images = [noise[n * 500 : (n + 1) * 500] for n in range(300)]
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    options = {"row_group_size": 100, "use_dictionary": False, "write_batch_size": 5, "data_page_size": 12_000}
    pq.write_table(pa.table({"image": images}), path, write_page_checksum=True, **options)
    return path.read_bytes()


def test_row_groups_and_pages_are_read_in_order(pages: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(pages)
    noise = np.random.default_rng(0).bytes(300 * 500)
    assert found(tmp_path / "a.parquet") == [(str(n), noise[n * 500 : (n + 1) * 500]) for n in range(300)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"PAR1",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-100] + bytes(92) + data[-8:],
        lambda data: b"<html>" * 1000,
    ],
    ids=["0-bytes", "magic", "half", "last-byte", "footer-length", "footer", "html"],
)
def test_parquet_without_its_footer_is_one_error_row(
    pages: bytes, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.parquet").write_bytes(damage(pages))
    assert found(tmp_path / "a.parquet") == [(None, "corrupt_shard")]


def test_damaged_page_keeps_the_rows_before_it(pages: bytes, tmp_path: Path) -> None:
    damaged = bytearray(pages)
    damaged[len(pages) // 2] ^= 1  # in a page of the second row group
    (tmp_path / "a.parquet").write_bytes(damaged)
    *kept, last = found(tmp_path / "a.parquet")
    assert last == (None, "corrupt_shard")
    assert 100 <= len(kept) <= 150
    noise = np.random.default_rng(0).bytes(300 * 500)
    assert kept == [(str(n), noise[n * 500 : (n + 1) * 500]) for n in range(len(kept))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_parquet_bytes_are_accounted_for(
    pages: bytes, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], in_footer: bool
) -> None:
    damaged = bytearray(pages)
    begin = len(pages) - 8 - int.from_bytes(pages[-8:-4], "little") if in_footer else 0
    for place, new in changes:
        damaged[begin + int(place * (len(pages) - 9 - begin))] = new
    path = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    path.write_bytes(damaged)
    samples(path)  # checks indices and keys


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
    monkeypatch.setattr(readers, "MAX_IMAGE_BYTES", 5)
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

    def read(self, url: str, version: str | None = None) -> bytes:
        with self.open(url, version) as file:
            return file.read()


@pytest.mark.parametrize("error", [StoreUnavailable("down"), AccessDenied("no"), SourceChanged("new")], ids=repr)
@pytest.mark.parametrize("after", [0, 100_000, 2_500_000])
def test_errors_of_the_store_come_out_as_they_are(source: tuple[Path, Path], after: int, error: PipelineError) -> None:
    """Not as damage: the shard must stay open."""
    (shard,), config = shards_of(source[0])
    before: list[Sample] = []
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
