"""What `Store` promises, on a local disk and on a real S3 server alike; then what only S3 has."""

from __future__ import annotations

import os
import pickle
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import remote
from pipeline.config import Storage
from pipeline.errors import AccessDenied, ConfigError, NotFound, OutcomeUnknown, SourceChanged, StoreUnavailable
from pipeline.storage import Store
from pipeline.urls import join
from tests.support.s3 import Identity, S3Server, free_ports, s3_server

QUICK = {"connect_timeout_s": 0.5, "read_timeout_s": 0.5, "deadline_s": 1.0}
OVERTIME_S = 15.0  # of the last attempt, which tries three times itself, on a busy machine
AT_ONCE_S = 30.0  # what is not tried again is over long before the deadline of two minutes
ODD_NAMES = (
    *("we ird+%20/é=&.tar", "a#b?c.tar", "?versionId=1", "x..y", 'it\'s "quoted"', "~home", "semi;colon,", "[ab]*.tar"),
    *("{brace}", "$HOME", "日本/写真.jpg", "100%.tar", "a@b:c", "." * 3 + "dots"),
)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@dataclass(frozen=True)
class Place:
    """A store and an empty folder in it."""

    store: Store
    url: str

    def at(self, *names: str) -> str:
        return join(self.url, *names)

    def names(self) -> list[str]:
        return [info.url.removeprefix(self.url + "/") for info in self.store.find(self.url)]


@pytest.fixture
def connect(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`connect(identity, **storage)`: a store for this identity."""

    def make(identity: Identity | None, **settings: Any) -> Store:
        s3.become(monkeypatch, identity)
        return Store(Storage(**({"endpoint_url": s3.endpoint_url} | settings)))

    return make


@pytest.fixture
def on_s3(connect: Any, s3: S3Server, request: pytest.FixtureRequest) -> Place:
    return Place(connect(s3.owner), f"s3://labels/{abs(hash(request.node.nodeid)):x}")


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Place(Store(), f"file://{tmp_path}/store")
    found: Place = request.getfixturevalue("on_s3")
    return found


# --- On any store --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_put_answers_the_version_that_everything_else_shows(place: Place, tmp_path: Path, as_file: bool) -> None:
    (tmp_path / "source").write_bytes(b"content")
    url = place.at("folder", "x.bin")
    version = place.store.put(url, tmp_path / "source" if as_file else b"content")
    info = place.store.info(url)
    assert (info.url, info.size, info.version) == (url, 7, version)
    assert '"' not in version
    assert place.store.find(place.url) == list(place.store.each_match(place.at("*", "*"))) == [info]
    assert place.store.starting_with(place.at("folder", "x.")) == [info]
    assert place.store.infos([url, url]) == [info, info]
    with place.store.open(url, version) as file:
        assert file.read() == b"content"
    assert place.store.read(url, version) == b"content"
    assert [place.store.read(url, limit=limit) for limit in (0, 3, 9)] == [b"", b"con", b"content"]
    assert (tmp_path / "source").read_bytes() == b"content"


def test_find_lists_what_is_below_a_folder_and_nothing_beside_it(place: Place) -> None:
    for name in ("raw/b", "raw/deep/er/a", "raw/a", "raw2/x", "raw.txt", "ra/w"):
        place.store.put(place.at(name), b"x")
    below = [place.at(name) for name in ("raw/a", "raw/b", "raw/deep/er/a")]
    for url in (place.at("raw"), place.at("raw") + "/"):
        assert [info.url for info in place.store.find(url)] == below
    assert place.store.find(place.at("raw", "a")) == place.store.find(place.at("rav")) == []


def test_starting_with_sees_one_folder_only(place: Place) -> None:
    for name in ("m/a.1", "m/a.2", "m/ab", "m/b", "m/a./deep", "a.3"):
        place.store.put(place.at(name), b"x")
    found = place.store.starting_with(place.at("m", "a."))
    assert [info.url for info in found] == [place.at("m/a.1"), place.at("m/a.2")]
    assert place.store.starting_with(place.at("nothing", "a.")) == []


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*.tar", ["a.tar"]),
        ("d?/*.tar", ["d1/b.tar", "d2/c.tar"]),
        ("d[2-9]/*", ["d2/c.tar"]),
        ("d[!2]/*.tar", ["d1/b.tar"]),
        ("**/*.tar", ["a.tar", "d1/b.tar", "d1/e/f/g.tar", "d2/c.tar"]),
        ("d1/**", ["d1/b.tar", "d1/e/f/g.tar"]),
        ("*/e/*/g.tar", ["d1/e/f/g.tar"]),
        ("a.ta", []),
        ("x*/*.tar", []),
        ("[a]*.tar", ["a.tar"]),
    ],
)
def test_glob(place: Place, pattern: str, matches: list[str]) -> None:
    for name in ("a.tar", "a.tar.md5", "d1/b.tar", "d1/e/f/g.tar", "d2/c.tar", "d/x.tar.gz"):
        place.store.put(place.at(name), b"x")
    assert sorted(info.url for info in place.store.each_match(place.at(pattern))) == [
        place.at(name) for name in matches
    ]


def test_names_come_back_as_they_are(place: Place) -> None:
    names = [*ODD_NAMES, unicodedata.normalize("NFC", "ü.tar"), unicodedata.normalize("NFD", "ü.tar")]
    for name in names:
        place.store.put(place.at(name), name.encode())
    assert sorted(place.names()) == sorted(names)
    for info in place.store.find(place.url):
        name = info.url.removeprefix(place.url + "/")
        assert place.store.info(info.url) == info
        assert place.store.read(info.url, info.version) == name.encode()
        with place.store.open(info.url, info.version) as file:
            assert file.read() == name.encode()


def test_what_does_not_exist_is_not_found_at_once(place: Place) -> None:
    place.store.put(place.at("folder", "x"), b"x")
    began = time.monotonic()
    for url in (place.at("nothing"), place.at("folder"), place.at("folder", "x", "y")):
        for look in (place.store.info, place.store.open, place.store.read):
            with pytest.raises(NotFound, match=url):
                look(url)
    assert time.monotonic() - began < AT_ONCE_S, "there is nothing to wait for"


def test_delete_is_no_error_the_second_time(place: Place) -> None:
    place.store.put(place.at("x"), b"x")
    place.store.delete(place.at("x"))
    place.store.delete(place.at("x"))
    assert place.names() == []


def test_readers_see_the_old_file_or_the_new_one(place: Place) -> None:
    url, contents = place.at("x"), {bytes([n]) * (30_000 + n) for n in range(10)}
    place.store.put(url, min(contents))
    over, seen = threading.Event(), []

    def look() -> None:
        while not over.is_set():
            seen.append((place.store.read(url), [info.url for info in place.store.find(place.url)]))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for content in sorted(contents) * 2:
            place.store.put(url, content)
        over.set()
        looking.result()
    assert all(data in contents and listed == [url] for data, listed in seen)
    assert len({data for data, _ in seen}) > 2


def test_of_two_that_put_if_absent_one_wins(place: Place) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(10):
            url, both = place.at(str(number)), threading.Barrier(2)

            def race(data: bytes, url: str = url, both: threading.Barrier = both) -> bool:
                both.wait()
                return place.store.put_if_absent(url, data)

            won = list(pool.map(race, [b"first", b"second"]))
            assert sorted(won) == [False, True]
            assert place.store.read(url) == (b"first" if won[0] else b"second")


def test_another_version_is_refused(place: Place) -> None:
    url = place.at("x.tar")
    old = place.store.put(url, b"old")
    new = place.store.put(url, b"new")
    assert old != new
    for read in (place.store.open, place.store.read):
        with pytest.raises(SourceChanged, match=r"x\.tar"):
            read(url, old)


@pytest.mark.parametrize("replace", [True, False])
def test_a_stream_never_mixes_two_versions(place: Place, replace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 1000)
    old = os.urandom(100_000)
    version = place.store.put(place.at("x"), old)
    with place.store.open(place.at("x"), version) as file:
        begun = file.read(1000)
        if replace:
            place.store.put(place.at("x"), os.urandom(100_000))
        else:
            place.store.delete(place.at("x"))
        if place.url.startswith("s3"):
            with pytest.raises(SourceChanged, match="changed"):
                file.read()
        else:
            assert begun + file.read() == old


def test_streams_seek_and_fill_buffers(place: Place) -> None:
    data = bytes(range(256)) * 100
    place.store.put(place.at("x"), data)
    with place.store.open(place.at("x"), read_ahead=False) as file:
        file.seek(-10, 2)
        assert (file.tell(), file.read(), file.read(1)) == (len(data) - 10, data[-10:], b"")
        file.seek(300)
        buffer = bytearray(50)
        assert file.readinto(buffer) == 50
        assert buffer == data[300:350]
        assert file.tell() == 350


def test_listings_are_never_stale(place: Place, s3: S3Server) -> None:
    """Another program writes and deletes; this process has listed before."""
    bucket, _, folder = place.url.removeprefix("s3://").partition("/")
    place.store.put(place.at("first"), b"x")
    assert place.names() == ["first"]
    with pytest.raises(NotFound):
        place.store.info(place.at("second"))
    if place.url.startswith("s3"):
        s3.client(s3.owner).put_object(Bucket=bucket, Key=f"{folder}/second", Body=b"xx")
        s3.client(s3.owner).delete_object(Bucket=bucket, Key=f"{folder}/first")
    else:
        Path(place.url.removeprefix("file://"), "second").write_bytes(b"xx")
        Path(place.url.removeprefix("file://"), "first").unlink()
    assert place.names() == ["second"]
    assert place.store.info(place.at("second")).size == 2
    with pytest.raises(NotFound):
        place.store.info(place.at("first"))


def test_a_store_travels_and_works_after_a_fork(place: Place) -> None:
    place.store.put(place.at("x"), b"content")
    copy = pickle.loads(pickle.dumps(place.store))
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if copy.read(place.at("x")) == place.store.read(place.at("x")) == b"content" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert copy.read(place.at("x")) == b"content"


# --- S3 alone ------------------------------------------------------------------------------------------------------


def test_a_key_may_be_a_file_and_a_folder(on_s3: Place) -> None:
    on_s3.store.put(on_s3.at("raw"), b"file")
    on_s3.store.put(on_s3.at("raw", "x"), b"below")
    assert on_s3.store.info(on_s3.at("raw")).size == 4
    assert on_s3.store.read(on_s3.at("raw")) == b"file"
    assert [info.url for info in on_s3.store.find(on_s3.at("raw"))] == [on_s3.at("raw", "x")]


def test_placeholders_of_folders_are_no_files(on_s3: Place, s3: S3Server) -> None:
    folder = on_s3.url.removeprefix("s3://labels/")
    for key in (f"{folder}/", f"{folder}/empty/"):
        s3.client(s3.owner).put_object(Bucket="labels", Key=key, Body=b"")
    on_s3.store.put(on_s3.at("x"), b"")
    only = [on_s3.store.info(on_s3.at("x"))]
    assert on_s3.store.find(on_s3.url) == list(on_s3.store.each_match(on_s3.at("**"))) == only
    assert on_s3.store.starting_with(on_s3.url + "/") == only
    with pytest.raises(NotFound, match="folder"):
        on_s3.store.info(on_s3.at("empty/"))


@pytest.mark.parametrize("pattern", ["**", "*.tar"])
def test_long_listings_come_page_by_page(on_s3: Place, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:02}.tar" for number in range(7)]
    for name in names:
        on_s3.store.put(on_s3.at(name), b"x")
    monkeypatch.setattr(remote, "LIST_PAGE", 3)
    assert sorted(info.url for info in on_s3.store.each_match(on_s3.at(pattern))) == [on_s3.at(name) for name in names]


def test_what_is_too_large_for_one_put_goes_up_in_parts(
    on_s3: Place, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_SINGLE_PUT", 2**20)
    monkeypatch.setattr(remote, "MULTIPART_CHUNK", 5 * 2**20)  # S3's least
    data = os.urandom(12 * 2**20)
    (tmp_path / "large").write_bytes(data)
    version = on_s3.store.put(on_s3.at("large"), tmp_path / "large")
    assert version.endswith("-3")
    assert on_s3.store.info(on_s3.at("large")).version == version
    assert on_s3.store.find(on_s3.url)[0].version == version
    assert on_s3.store.read(on_s3.at("large"), version) == data
    assert "Uploads" not in s3.client(s3.owner).list_multipart_uploads(Bucket="labels")


def test_a_missing_bucket_is_an_error_that_names_it(connect: Any, s3: S3Server) -> None:
    store = connect(s3.owner)
    began = time.monotonic()
    for ask in (store.find, lambda url: list(store.each_match(url)), store.starting_with, store.read, store.delete):
        with pytest.raises(ConfigError, match=r"s3://no-such-bucket.*does not exist"):
            ask("s3://no-such-bucket/raw*")
    for write in (store.put, store.put_if_absent):
        with pytest.raises(ConfigError, match=r"s3://no-such-bucket/x.*does not exist"):
            write("s3://no-such-bucket/x", b"")
    for url in ("s3://", "s3:///x", "s3://Not a bucket/x"):
        with pytest.raises(ConfigError, match="bucket"):
            store.find(url)
    assert time.monotonic() - began < AT_ONCE_S, "there is nothing to wait for"


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (None, "AWS_ACCESS_KEY_ID"),
        (Identity("owner-key", "wrong"), "signature.*AWS_ACCESS_KEY_ID"),
        (Identity("nobody", "owner-secret"), "does not exist in our records.*AWS_ACCESS_KEY_ID"),
    ],
)
def test_without_the_right_credentials_access_is_denied(connect: Any, identity: Identity | None, says: str) -> None:
    store = connect(identity)
    began = time.monotonic()
    for act in (store.find, store.read, lambda url: store.put(url, b""), lambda url: store.put_if_absent(url, b"")):
        with pytest.raises(AccessDenied, match=f"(?s)s3://labels/x.*{says}") as denied:
            act("s3://labels/x")
        assert "wrong" not in str(denied.value)
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        store.info("s3://labels/x")
    assert time.monotonic() - began < AT_ONCE_S, "there is nothing to wait for"


def test_a_job_can_do_what_it_may_and_no_more(connect: Any, s3: S3Server) -> None:
    client = s3.client(s3.owner)
    client.create_bucket(Bucket="private")
    for bucket in ("private", "raw"):
        client.put_object(Bucket=bucket, Key="x.tar", Body=b"content")
    job = connect(s3.job)
    assert job.read("s3://raw/x.tar") == b"content"
    job.delete("s3://labels/mine")
    assert job.put_if_absent("s3://labels/mine", b"x")
    for act in (job.info, job.read, job.find, lambda url: list(job.each_match(url)), job.delete):
        with pytest.raises(AccessDenied, match="s3://private"):
            act("s3://private/x.tar")
    for act in (job.delete, lambda url: job.put(url, b""), lambda url: job.put_if_absent(url, b"")):
        with pytest.raises(AccessDenied, match="s3://raw/x"):
            act("s3://raw/x.tar")
    assert client.get_object(Bucket="raw", Key="x.tar")["Body"].read() == b"content"


def test_a_store_that_is_down_is_unavailable_within_the_deadline(connect: Any, s3: S3Server) -> None:
    store = connect(s3.owner, **{**QUICK, "endpoint_url": f"http://127.0.0.1:{free_ports(1)[0]}"})
    acts: list[Any] = [store.find, store.info, store.read, store.open, store.delete]
    writes: list[Any] = [lambda url: store.put(url, b""), lambda url: store.put_if_absent(url, b"")]

    def take(act: Any) -> tuple[float, Exception]:
        began = time.monotonic()
        with pytest.raises((StoreUnavailable, OutcomeUnknown), match=r"s3://labels/x.*[Rr]un again") as failed:
            act("s3://labels/x")
        return time.monotonic() - began, failed.value

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(take, acts + writes))
    assert [type(error) for _, error in answers] == [StoreUnavailable] * 5 + [OutcomeUnknown] * 2
    assert max(seconds for seconds, _ in answers) < QUICK["deadline_s"] + OVERTIME_S


def test_lookups_stop_at_the_first_that_fails(connect: Any, s3: S3Server) -> None:
    store = connect(s3.owner, **{**QUICK, "endpoint_url": f"http://127.0.0.1:{free_ports(1)[0]}"})
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.infos([f"s3://labels/{number}" for number in range(500)])
    assert time.monotonic() - began < QUICK["deadline_s"] + OVERTIME_S


def test_the_data_survives_the_server(on_s3: Place, s3: S3Server) -> None:
    """And a store goes on after a restart of the server."""
    on_s3.store.put(on_s3.at("x"), b"content")
    s3.restart()
    assert on_s3.store.read(on_s3.at("x")) == b"content"
