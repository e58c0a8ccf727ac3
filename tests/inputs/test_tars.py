"""What is read from tars, whole or damaged."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs import tars
from tests.inputs.reading import Found, found, samples
from tests.support.tars import header, member, tar


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Found]:
    """`packed(("a.jpg", b"…"), …)`: what is read from a tar of these members; `packed(b"…")`: of these bytes."""

    def pack(*members: Any, name: str = "shard.tar", kind: int = tarfile.PAX_FORMAT) -> Found:
        data = members[0] if members and isinstance(members[0], bytes) else tar(*members, kind=kind)
        (tmp_path / name).write_bytes(data)
        return found(tmp_path / name, format="webdataset")

    return pack


Pack = Callable[..., Found]

# --- Samples and keys ------------------------------------------------------------------------------------------------


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


# --- Members that are no plain files ---------------------------------------------------------------------------------


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
    monkeypatch.setattr("pipeline.inputs.samples.MAX_IMAGE_BYTES", 1000)
    data = tar(("a.jpg", bytes(1000)), ("b.jpg", bytes(1001)), ("b.json", bytes(5000)), ("c.jpg", b"3"))
    for name, content in {"shard.tar": data, "shard.tgz": gzip.compress(data)}.items():
        assert packed(content, name=name) == [("a", bytes(1000)), ("b", "member_too_large"), ("c", b"3")]


# --- Damage ----------------------------------------------------------------------------------------------------------

MEMBERS = [("a.jpg", b"A" * 700), ("a.json", b"{}"), ("b.jpg", b"B" * 512), ("b" * 120 + ".jpg", b"C" * 1500)]
IMAGES: Found = [("a", b"A" * 700), ("b", b"B" * 512), ("b" * 120, b"C" * 1500)]


@pytest.fixture(scope="module", params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def whole(request: pytest.FixtureRequest) -> bytes:
    """Up to the end marker's two blocks, without more padding."""
    data = tar(*MEMBERS, kind=request.param)
    return data[: ends(data)[-1] + -ends(data)[-1] % 512 + 1024]


def ends(data: bytes) -> list[int]:
    """Where the content of each image ends."""
    return [data.rindex(content) + len(content) for _, content in IMAGES if isinstance(content, bytes)]


def test_tar_cut_off_anywhere_keeps_what_came_before(whole: bytes, packed: Pack) -> None:
    """In a header, in a long name, in data, in padding, at a member's border, before or in the end marker."""
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


def for_all(**attributes: str) -> bytes:
    """A PAX global header."""
    return tarfile.TarInfo.create_pax_global_header(attributes)  # type: ignore[no-any-return]


def test_attributes_for_all_members_do_not_pile_up(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each header is small, and all of them are kept for what follows."""
    monkeypatch.setattr(tars, "MAX_HEADER_BYTES", 10_000)
    repeated = b"".join(for_all(same="x" * 3000) + tar((f"{n}.jpg", b"1"))[:1024] for n in range(10))
    new = b"".join(for_all(**{f"new{n}": "x" * 3000}) + tar((f"{n}.jpg", b"1"))[:1024] for n in range(10))
    assert packed(repeated + bytes(1024)) == [(str(n), b"1") for n in range(10)]
    assert packed(new + bytes(1024)) == [*((str(n), b"1") for n in range(3)), (None, "corrupt_shard")]


def test_attributes_for_all_members_are_not_given_to_each_of_them_without_end(packed: Pack) -> None:
    """Of 520,000 in 4 MB, a member took a tenth of a second."""
    some, many = (for_all(**{f"k{n}": "" for n in range(count)}) for count in (1000, 1001))
    assert packed(some + tar(("a.jpg", b"1"))) == [("a", b"1")]
    assert packed(tar(("a.jpg", b"1"))[:1024] + many + tar(("b.jpg", b"2"))) == [("a", b"1"), (None, "corrupt_shard")]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_without_end_is_damage(packed: Pack, kind: int) -> None:
    """A block may hold thousands of them."""
    name = "n" * 65_532
    assert packed((f"{name}.jpg", b"1"), kind=kind) == [(name, b"1")]
    assert packed(("a.jpg", b"1"), (f"{name}n.jpg", b"2"), kind=kind) == [("a", b"1"), (None, "corrupt_shard")]


@pytest.mark.parametrize("count", [1, 3])
def test_attributes_for_all_members_without_members_are_no_damage(packed: Pack, count: int) -> None:
    """`git archive` writes such a tar of an empty tree."""
    headers = for_all(comment="x") * count
    assert packed(headers + bytes(1024)) == []
    assert packed(gzip.compress(headers + bytes(10_240)), name="a.tgz") == []
    assert packed(tar(("a.jpg", b"1"))[:1024] + headers + bytes(1024)) == [("a", b"1")]
    assert packed(headers) == [(None, "truncated_shard")]


def test_attributes_of_a_member_that_is_not_there_are_damage(packed: Pack) -> None:
    own = header("pax", 8, tarfile.XHDTYPE) + b"8 a=bcd\n".ljust(512, b"\0")
    for headers in (own, for_all(comment="x") + own, own + for_all(comment="x")):
        assert packed(headers + bytes(1024)) == [(None, "corrupt_shard")]


def lying(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header block with any size, written in base 256 where octal digits do not do."""
    block = bytearray(header(name, kind=kind))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]  # type: ignore[attr-defined]
    return bytes(block)


@pytest.mark.parametrize("name", ["b.jpg", "b.txt"])
@pytest.mark.parametrize("size", [-512, -1024, -1536, -(10**9)])  # the third points to the tar's beginning
def test_negative_sizes_are_damage_and_no_loop(packed: Pack, name: str, size: int) -> None:
    block = lying(name, size)
    assert packed(tar(("a.jpg", b"1"))[:1024] + block + bytes(4096)) == [("a", b"1"), (None, "corrupt_shard")]


@pytest.mark.parametrize("size", [2**44, 2**50, 2**63 - 1, 2**63, 2**70])
def test_absurd_sizes_are_damage(packed: Pack, size: int) -> None:
    """In a header, in attributes, and of a sparse file, whose own size is another; plain and compressed."""
    attributes = b"%d size=%d\n" % (7 + len(str(size)) + 2, size)
    pax = header("pax", len(attributes), tarfile.XHDTYPE) + attributes.ljust(512, b"\0") + header("b.jpg")
    for blocks in (lying("b.jpg", size), lying("b.txt", size), pax, lying("b.txt", size, tarfile.GNUTYPE_SPARSE)):
        data = tar(("a.jpg", b"1"))[:1024] + blocks + bytes(4096)
        assert packed(data) == [("a", b"1"), (None, "corrupt_shard")]
        assert packed(gzip.compress(data), name="a.tgz") == [("a", b"1"), (None, "corrupt_shard")]


def test_a_size_that_a_disk_may_have_is_skipped_or_cut_off(packed: Pack) -> None:
    data = tar(("a.jpg", b"1"))[:1024] + lying("b.jpg", 2**43 - 512) + bytes(4096)
    assert packed(data) == [("a", b"1"), ("b", "member_too_large"), (None, "truncated_shard")]


changes = st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


@settings(max_examples=150)
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
