"""How loose files are grouped: their roots, their names, and groups that stay what they are as files come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backends import FileInfo
from pipeline.inputs.shards import current_fingerprint, group_files, relative
from pipeline.storage import Store
from tests.inputs.discovery import NO_UTF8, found, paths, touch

ROOT = "file:///photos"


@pytest.mark.parametrize("url", ["photos", "photos/", "photos//", "photos/**/*.jpg", "photos/*/../*/*.jpg"])
def test_keys_are_relative_to_the_root_however_it_is_written(tmp_path: Path, url: str) -> None:
    touch(tmp_path, "photos/a/1.jpg", "photos/b/2.jpg")
    (group,) = found(f"{tmp_path}/{url}")
    assert group.url == f"file://{tmp_path}/photos#"
    assert paths([group]) == ["a/1.jpg", "b/2.jpg"]


def test_single_images_and_their_folder_share_a_root(tmp_path: Path) -> None:
    touch(tmp_path, "photos.jpg/a.jpg", "photos.jpg/b.JPEG")
    (group,) = found(tmp_path / "photos.jpg/b.JPEG", tmp_path / "photos.jpg/a.jpg")
    assert group == found(tmp_path / "photos.jpg")[0]
    assert paths([group]) == ["a.jpg", "b.JPEG"]


def test_the_outermost_of_nested_roots_names_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "in/b.jpg", "in/deep/c.jpg")
    outer = found(tmp_path)
    assert found(tmp_path / "in/deep", tmp_path, tmp_path / "in") == outer
    shards = found(tmp_path / "*.jpg", tmp_path / "in")  # the pattern does not reach into the folder
    assert {shard.url for shard in shards} == {f"file://{tmp_path}#", f"file://{tmp_path}/in#"}
    assert paths(shards) == ["a.jpg", "b.jpg", "deep/c.jpg"]


@pytest.mark.parametrize("name", ["#1.jpg", "a#b/c.jpg", "fünf 5.jpg", "日本/猫.jpg", "a\nb.jpg"])
def test_odd_names_begin_groups_as_well(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "zzz.jpg")
    shards = found(tmp_path, group_size=1)
    assert {shard.url for shard in shards} == {f"file://{tmp_path}#{name}", f"file://{tmp_path}#zzz.jpg"}
    assert paths(shards) == sorted([name, "zzz.jpg"])
    assert all(current_fingerprint(shard, Store()) == shard.fingerprint for shard in shards)


def test_images_whose_names_are_not_utf8_never_begin_a_group(tmp_path: Path) -> None:
    touch(tmp_path, f"{NO_UTF8}.jpg", "a.jpg", f"{NO_UTF8}/1.jpg", "z.jpg")
    shards = found(tmp_path, group_size=1)
    assert {shard.url for shard in shards} == {f"file://{tmp_path}#a.jpg", f"file://{tmp_path}#z.jpg"}
    assert len(paths(shards)) == 4
    assert all(current_fingerprint(shard, Store()) == shard.fingerprint for shard in shards)


def test_names_below_a_root_keep_slashes_of_their_own() -> None:
    """An object store tells `raw/a.jpg` and `raw//a.jpg` apart."""
    files = [FileInfo(f"s3://b/raw{name}", 1, "v") for name in ("/a.jpg", "//a.jpg")]
    shards = list(group_files("s3://b/raw", files, 1))
    assert [shard.url for shard in shards] == ["s3://b/raw#/a.jpg", "s3://b/raw#a.jpg"]


Groups = dict[str, tuple[str, ...]]
some_paths = st.sets(st.text("ab/#é\udcff", min_size=1, max_size=6), max_size=40)
sizes = st.integers(1, 6)


def groups(members: set[str], group_size: int) -> Groups:
    """Group URL to member paths. Listed in no order."""
    files = [FileInfo(f"{ROOT}/{path}", len(path), "v") for path in members]
    cut = list(group_files(ROOT, files, group_size))
    result = {shard.url: tuple(relative(ROOT, member.url) for member in shard.members) for shard in cut}
    assert len(result) == len(cut), "two groups have one name"
    return result


@given(some_paths, sizes)
def test_groups_hold_every_file_once_and_in_order(members: set[str], group_size: int) -> None:
    cut = groups(members, group_size)
    assert sorted(path for group in cut.values() for path in group) == sorted(members)
    begins = sorted(cut)
    assert [path for url in begins for path in cut[url]] == sorted(members)
    for url in begins:
        assert url == f"{ROOT}#{cut[url][0]}" or (url == f"{ROOT}#" and url == begins[0])


@given(some_paths, st.text("ab/#é\udcff", min_size=1, max_size=6), sizes)
def test_a_file_that_comes_or_goes_changes_its_group_or_splits_or_merges_two(
    members: set[str], path: str, group_size: int
) -> None:
    without, with_it = groups(members - {path}, group_size), groups(members | {path}, group_size)
    old = dict(without.items() - with_it.items())
    new = dict(with_it.items() - without.items())
    assert len(old) <= 1
    assert 1 <= len(new) <= 2
    assert len(new) == 1 or f"{ROOT}#{path}" in new  # only a file that begins a group splits one
    moved = {member for group in new.values() for member in group}
    assert moved == {member for group in old.values() for member in group} | {path}


@given(some_paths, st.lists(st.text("ab", max_size=4), max_size=10), sizes)
def test_appending_in_name_order_changes_the_last_group_only(
    members: set[str], later: list[str], group_size: int
) -> None:
    before = groups(members, group_size)
    after = groups(members | {f"\U0010ffff{name}" for name in later}, group_size)
    untouched = sorted(before)[:-1]
    assert {url: after[url] for url in untouched} == {url: before[url] for url in untouched}


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([20, 100]))
def test_groups_have_the_wanted_size_on_average(seed: int, group_size: int) -> None:
    cut = groups({f"{seed}/{number:06}.jpg" for number in range(100 * group_size)}, group_size)
    assert 60 < len(cut) < 150
