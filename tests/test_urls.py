"""URLs: their one absolute form, patterns, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FatalError
from pipeline.model.cache import cache_directory
from pipeline.model.classes import find_file
from pipeline.storage import Store
from pipeline.urls import canonical, split_pattern


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/data/x", "file:///data/x"),
        ("/data/./y/../x/", "file:///data/x"),
        ("//data/x", "file:///data/x"),
        ("x y", "file:///here/x y"),
        ("../x", "file:///x"),
        ("~/x", "file:///home/me/x"),
        ("file:///data/x", "file:///data/x"),
        ("file://x", "file:///here/x"),
        ("local:///data/x", "file:///data/x"),
        ("/", "file:///"),
        ("s3://bucket/a//b/../c/", "s3://bucket/a//b/../c/"),
        ("s3a://bucket/x", "s3://bucket/x"),
        ("s3n://bucket/x", "s3://bucket/x"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("https://host/x?next=http://other/", "https://host/x?next=http://other/"),
    ],
)
def test_canonical(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert canonical(url) == expected
    assert canonical(expected) == expected


NO_HOME = r"~nobody-here/x: there is no home folder ~nobody-here\. Where that is a name: \./~nobody-here/x"


@pytest.mark.parametrize("find", [canonical, lambda path: find_file(path, None, "model.classes")])
def test_a_home_folder_that_is_not_there_is_a_sentence(find: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match=NO_HOME):
        find("~nobody-here/x")
    assert canonical("./~nobody-here/x") == f"file://{Path.cwd()}/~nobody-here/x"


def test_a_cache_in_a_home_folder_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_BATCH_CACHE", "~nobody-here/x")
    with pytest.raises(FatalError, match=f"{NO_HOME}.*Set RESNET_BATCH_CACHE"):
        cache_directory("weights")


@pytest.mark.parametrize(
    ("url", "says"),
    [("memory://x", "workers"), ("", "no file"), ("file://", "no file"), ("s3:/bucket/x", "two slashes")],
)
def test_urls_that_no_worker_could_find_are_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        canonical(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/raw/*.tar", ("s3://b/raw", True)),
        ("s3://b/raw/d?/x", ("s3://b/raw", True)),
        ("s3://b/raw/x.tar", ("s3://b/raw/x.tar", False)),
        ("http://[::1]:80/x.tar?sig=1", ("http://[::1]:80/x.tar?sig=1", False)),
        ("http://h/x/*.tar", ("http://h/x", True)),
    ],
)
def test_split_pattern(url: str, expected: tuple[str, bool]) -> None:
    assert split_pattern(url) == expected


@pytest.mark.parametrize(
    ("pattern", "says"), [("s3://*/x", "bucket"), ("s3://b*/x", "bucket"), ("s3://b/a**/x", "path component")]
)
def test_patterns_that_make_no_sense_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list(Store().each_match(pattern))


def test_patterns_may_begin_at_the_root_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    first = tmp_path.parts[1]
    pattern = f"/{first[:-1]}?/{tmp_path.relative_to(f'/{first}')}/x"
    assert [info.url for info in Store().each_match(pattern)] == [f"file://{tmp_path}/x"]
