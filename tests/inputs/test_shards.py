"""Discovery: which shards an input's URLs stand for, their ids and fingerprints."""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Input, make_config
from pipeline.errors import ConfigError, SourceChanged
from pipeline.inputs.shards import current_fingerprint, discover, relative, shard_id
from pipeline.storage import Store
from pipeline.urls import with_absolute_urls
from tests.inputs.discovery import NO_UTF8, found, names, paths, touch

# --- Ids -----------------------------------------------------------------------------------------------------------


def test_ids_never_change() -> None:
    """Parts and marks are named by them: another rule would make every dataset start anew."""
    assert shard_id("s3://bucket/raw/train-0001.tar") == "train-0001.tar-cde769b83f5fa469"
    assert shard_id("file:///data/a b_ü.tar") == "ab.tar-261c5f2934bf9b13"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/x/train_01.tar", "train01.tar"),
        ("s3://b/..hidden.tar", "hidden.tar"),
        ("s3://b/_.a.tar", "a.tar"),
        ("s3://b/-a.tar", "-a.tar"),
        ("s3://b/" + "x" * 200 + ".tar", "x" * 80),
        ("s3://b/фото", ""),
        ("file:///photos#", "photos"),
        ("file:///photos#deep/a.jpg", "a.jpg"),
    ],
)
def test_id_is_the_reduced_file_name_and_a_hash(url: str, name: str) -> None:
    assert re.fullmatch(re.escape(name) + "-[0-9a-f]{16}", shard_id(url))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_id_of_any_url_is_a_safe_file_name(path: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9-][A-Za-z0-9.-]{0,79})?-[0-9a-f]{16}", shard_id("s3://b/" + path))


def test_ids_of_equal_names_differ_by_folder() -> None:
    assert shard_id("s3://b/1/a.tar") != shard_id("s3://b/2/a.tar")


def test_collision_is_refused(tmp_path: Path) -> None:
    """`x#y/z.jpg` below one root and `z.jpg` below another, `x#y`, would be one URL."""
    touch(tmp_path, "x/y#z.jpg", "x#y/z.jpg")
    with pytest.raises(ConfigError, match="have the same id xyz"):
        found(tmp_path / "x", tmp_path / "x#y", group_size=1)


# --- What a URL stands for -----------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    touch(tmp_path, "a.tar", "b.TAR.GZ", "deep/c.tgz", "deep/d.parquet", "e.pq", "deep/f.jpg", "notes.md", "g.bin")
    return tmp_path


def test_folder_is_read_recursively_by_suffix(mixed: Path) -> None:
    shards = found(mixed)
    kinds = {shard.url.rpartition("/")[2]: shard.kind for shard in shards if shard.kind != "files"}
    assert kinds == {
        **dict.fromkeys(("a.tar", "b.TAR.GZ", "c.tgz"), "webdataset"),
        **dict.fromkeys(("d.parquet", "e.pq"), "parquet"),
    }
    assert paths(shards) == ["deep/f.jpg"]


@pytest.mark.parametrize("name", ["photos [2026]", "what?", "*", "[ab"])
def test_a_local_folder_or_file_of_just_that_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{name}/a.tar", f"{name}/b.jpg", "photos 2/c.tar", "whats/c.tar")
    for url in (tmp_path / name, f"{tmp_path}/{name}/", f"file://{tmp_path}/{name}"):
        shards = found(url)
        assert paths(shards) == ["b.jpg"]
        assert names(shards) == {"a.tar", f"{name}#"}
    (tmp_path / f"{name}.txt").write_text(f"{name}/a.tar")
    for url in (tmp_path / name / "a.tar", tmp_path / f"{name}.txt"):
        assert [shard.url for shard in found(url)] == [f"file://{tmp_path}/{name}/a.tar"]


@pytest.mark.parametrize("name", ["set[1]", "what?", "st*rs"])
def test_a_folders_own_name_is_no_part_of_a_pattern_in_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, f"{name}/a.tar", f"{name}/b.jpg", f"{name}/c/d.tar", "set1/x.tar", "whats/x.tar", "stars/x.tar")
    monkeypatch.chdir(tmp_path / name)
    expected = {f"file://{tmp_path}/{name}/a.tar", f"file://{tmp_path}/{name}/c/d.tar"}
    assert {shard.url for shard in found("**/*.tar")} == expected
    assert [shard.url for shard in found("*.jpg")] == [f"file://{tmp_path}/{name}#"]
    (tmp_path / name / "list.txt").write_text("**/*.tar\n")
    monkeypatch.chdir(tmp_path)
    assert {shard.url for shard in found(tmp_path / name / "list.txt")} == expected
    escaped = f"{tmp_path}/{glob.escape(name)}/*.tar"
    assert [shard.url for shard in found(escaped)] == [f"file://{tmp_path}/{name}/a.tar"]
    job = make_config({"input": {"url": escaped}, "output": {"url": "out"}})
    assert with_absolute_urls(job).input.url == escaped


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.tar", {"a.tar"}), ("?.tar", {"a.tar"}), ("[ab].*", {"a.tar", "b.TAR.GZ"}), ("**/*.tgz", {"c.tgz"})],
)
def test_patterns(mixed: Path, pattern: str, expected: set[str]) -> None:
    assert names(found(mixed / pattern)) == expected


def test_pattern_with_auto_takes_known_suffixes_only(mixed: Path) -> None:
    assert names(found(mixed / "*")) == {"a.tar", "b.TAR.GZ", "e.pq"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("webdataset", {"a.tar", "b.TAR.GZ", "c.tgz"}), ("parquet", {"d.parquet", "e.pq"})],
)
def test_format_narrows_a_folder(mixed: Path, wanted: str, expected: set[str]) -> None:
    assert names(found(mixed, format=wanted)) == expected


def test_format_files_takes_only_images_of_a_folder(mixed: Path) -> None:
    assert paths(found(mixed, format="files")) == ["deep/f.jpg"]


def test_format_reads_whatever_a_pattern_or_a_name_chooses(mixed: Path) -> None:
    assert {(s.kind, s.url.rpartition("/")[2]) for s in found(mixed / "*.bin", mixed / "a.tar", format="parquet")} == {
        ("parquet", "g.bin"),
        ("parquet", "a.tar"),
    }
    (group,) = found(mixed / "g.bin", format="files")
    assert relative(group.root, group.members[0].url) == "g.bin"


def test_named_file_of_unknown_kind_is_refused(mixed: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot tell how to read .*g.bin. Set input.format"):
        found(mixed / "g.bin")


def test_hidden_files_and_folders_are_skipped_unless_spelled(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "_b.tar", ".c.tar", "_temporary/d.tar", ".e/f.tar", "g/_h/i.tar")
    assert names(found(tmp_path)) == {"a.tar"}
    assert names(found(tmp_path / "**/*.tar")) == {"a.tar"}
    assert names(found(tmp_path / "_b.tar", tmp_path / ".c.tar")) == {"_b.tar", ".c.tar"}
    assert names(found(tmp_path / "_*.tar")) == {"_b.tar"}
    assert names(found(tmp_path / "*/_h/*.tar")) == {"i.tar"}
    assert names(found(tmp_path / "_temporary", tmp_path / ".e/")) == {"d.tar", "f.tar"}


@pytest.mark.parametrize("output", ["labels", "labels/", "."])
def test_the_parts_of_a_dataset_below_the_input_are_not_input(tmp_path: Path, output: str) -> None:
    touch(tmp_path, "a.tar", "b.parquet", "labels/c.parquet", "labels/data/d.tar")
    own = [f"{output}/{name}" for name in ("data/a.tar-1.parquet", "errors/a.tar-1.parquet", "_ledger/a.json")]
    touch(tmp_path, *own)
    shards = discover(Input(url=str(tmp_path)), Store(), output=str(tmp_path / output))
    assert names(shards) == {"a.tar", "b.parquet", "c.parquet", "d.tar"}
    assert len(found(tmp_path)) == 6, "of any other dataset they are"


def test_nor_are_they_where_a_pattern_would_take_anything(tmp_path: Path) -> None:
    own = ("README.md", "data/a-1.parquet", "errors/a-1.parquet", "_ledger/a.json", "_runs/1/report.json")
    touch(tmp_path, "README.md", "a.img", *(f"labels/{name}" for name in own))
    config = Input(url=str(tmp_path / "**"), format="files")
    assert paths(discover(config, Store(), output=str(tmp_path / "labels"))) == ["README.md", "a.img"]


def test_file_that_several_urls_match_is_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "raw/a.tar")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "raw/a.tar"
    urls = (path, "raw/a.tar", f"file://{path}", "raw/../raw/a.tar", "raw", "raw/", "raw/*.tar", "**/*.tar")
    for url in urls:
        (shard,) = found(url)
        assert shard.url == f"file://{path}"
    assert len(found(*urls)) == 1


def test_order_of_urls_is_nothing(tmp_path: Path) -> None:
    touch(tmp_path, *(f"x/{name}" for name in ("a.tar", "y/b.jpg", "y/z/c.jpg", "d.jpg", "_e.tar")))
    urls = [tmp_path / "x", tmp_path / "x/y", tmp_path / "x/y/z/c.jpg", tmp_path / "x/_e.tar"]
    plans = [found(*order, group_size=2) for order in itertools.permutations(urls)]
    assert all(plan == plans[0] for plan in plans)
    assert [shard.id for shard in plans[0]] == sorted(shard.id for shard in plans[0])


# --- Empty listings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["nothing.tar", "nowhere/", "*.parquet", "docs"])
def test_url_with_nothing_to_read_is_refused_even_beside_others(tmp_path: Path, url: str) -> None:
    touch(tmp_path, "a.tar", "docs/readme.md")
    for urls in ([tmp_path / url], [tmp_path / "a.tar", tmp_path / url]):
        with pytest.raises(ConfigError, match=f"nothing to read under [^,]*/{re.escape(url.rstrip('/'))}"):
            found(*urls)
    assert names(found(tmp_path / url, tmp_path / "a.tar", allow_empty=True)) == {"a.tar"}


def test_empty_listing_is_fine_where_allowed(tmp_path: Path) -> None:
    assert found(tmp_path, allow_empty=True) == []


def test_a_long_list_of_empty_urls_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/4.tar \(no files\) and 15 more\. Check"):
        found(*(tmp_path / f"{number}.tar" for number in range(20)))


# --- Text files of URLs --------------------------------------------------------------------------------------------


def test_text_file_of_urls(tmp_path: Path) -> None:
    touch(tmp_path, "raw/a.tar", "raw/b.tar", "raw/sub/c.tar", "d.tar", "lists/e.tar", "lists/#f.tar")
    lines = ["\ufeff# nightly", f"{tmp_path}/raw/a.tar", "", f"  file://{tmp_path}/raw/b.tar\r", "../raw/su[b]/*"]
    (tmp_path / "lists/urls.txt").write_bytes("\n".join([*lines, "e.tar", "./#f.tar"]).encode())
    shards = found(tmp_path / "lists/urls.txt", tmp_path / "d.tar")
    assert names(shards) == {"a.tar", "b.tar", "c.tar", "d.tar", "e.tar", "#f.tar"}


def test_missing_empty_and_nested_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "nested.txt").write_text("empty.txt\n")
    touch(tmp_path, "a.tar")
    with pytest.raises(ConfigError, match=r"nothing to read under .*empty.txt \(no lines\)"):
        found(tmp_path / "a.tar", tmp_path / "empty.txt")
    assert len(found(tmp_path / "a.tar", tmp_path / "empty.txt", allow_empty=True)) == 1
    for name, message in {"no": "is not there", "empty": "nothing to read", "nested": "another list"}.items():
        with pytest.raises(ConfigError, match=message):
            found(tmp_path / f"{name}.txt")


def test_line_of_a_list_that_has_gone_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar")
    (tmp_path / "urls.txt").write_text("a.tar\ngone.tar\n")
    with pytest.raises(ConfigError, match=r"gone\.tar"):
        found(tmp_path / "urls.txt")


@pytest.mark.parametrize("url", [f"{NO_UTF8}.tar", f"{NO_UTF8}/", ""])
def test_shards_whose_names_are_not_utf8_are_refused(tmp_path: Path, url: str) -> None:
    touch(tmp_path, f"{NO_UTF8}.tar", f"{NO_UTF8}/1.jpg")
    with pytest.raises(ConfigError, match=r"caf\\udce9.* is not UTF-8\. Rename"):
        found(tmp_path / url)


# --- Fingerprints --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["a.tar", "a.parquet", "a.jpg"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    touch(tmp_path, request.param)
    return tmp_path / request.param


def fingerprint(source: Path) -> str:
    (shard,) = found(source)
    assert current_fingerprint(shard, Store()) == shard.fingerprint
    return shard.fingerprint


def test_fingerprint_follows_size_and_time(source: Path) -> None:
    seen = {fingerprint(source)}
    stat = source.stat()
    source.write_bytes(b"longer than before")
    os.utime(source, ns=(0, stat.st_mtime_ns))
    seen.add(fingerprint(source))
    os.utime(source, ns=(0, stat.st_mtime_ns + 1))
    seen.add(fingerprint(source))
    assert len(seen) == 3


def test_fingerprint_follows_nothing_else(source: Path) -> None:
    before = fingerprint(source)
    os.utime(source, ns=(0, source.stat().st_mtime_ns))  # time of access
    source.chmod(0o600)
    touch(source.parent, "unrelated.md")
    assert fingerprint(source) == before
    elsewhere = source.parent / "elsewhere"
    elsewhere.mkdir()
    assert fingerprint(source.rename(elsewhere / source.name)) == before


def test_fingerprint_of_a_group_follows_every_member(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (group,) = found(tmp_path)
    os.utime(tmp_path / "b.jpg", ns=(0, 0))
    changed = current_fingerprint(group, Store())
    assert changed != group.fingerprint
    touch(tmp_path, "d.jpg")  # is not of this group as it was planned
    assert current_fingerprint(group, Store()) == changed


def test_source_that_has_gone_is_a_change(source: Path) -> None:
    (shard,) = found(source)
    source.unlink()
    with pytest.raises(SourceChanged, match="has gone"):
        current_fingerprint(shard, Store())


def test_the_files_of_the_dataset_are_no_input_by_whatever_link(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.png", "real/data/a-1.parquet", "real/errors/a-1.parquet", "real/README.md")
    (tmp_path / "photos/labels").symlink_to(tmp_path / "real")
    for output in (tmp_path / "real", tmp_path / "photos/labels"):
        (shard,) = discover(Input(url=str(tmp_path / "photos")), Store(), output=str(output))
        assert [member.url.rpartition("/")[2] for member in shard.members] == ["a.png"]
