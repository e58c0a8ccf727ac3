"""S3 behind a line that fails, web servers, and whatever else fsspec reaches."""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import remote, storage
from pipeline.config import Input, Storage
from pipeline.errors import (
    AccessDenied,
    ConfigError,
    NotFound,
    OutcomeUnknown,
    SourceChanged,
    StoreUnavailable,
)
from pipeline.inputs import samples
from pipeline.inputs.readers import read
from pipeline.inputs.shards import discover
from pipeline.storage import Store
from tests.support.relay import Relay, relay
from tests.support.s3 import S3Server, free_ports, s3_server
from tests.support.web import serving

DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def line(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """What is between a store and its server."""
    s3.become(monkeypatch, s3.owner)
    with relay(s3.endpoint_url) as found:
        yield found


def store_behind(line: Relay, **settings: Any) -> Store:
    return Store(Storage(endpoint_url=line.url, connect_timeout_s=1.0, read_timeout_s=0.5, **settings))


# --- S3 behind a line that fails -----------------------------------------------------------------------------------


def test_a_store_that_is_busy_is_asked_again(line: Relay) -> None:
    once = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}}
    store = store_behind(line, options=once)  # so that it is we who ask again
    for method, act in {
        "PUT": lambda: store.put("s3://labels/busy", b"x"),
        "HEAD": lambda: store.info("s3://labels/busy"),
        "GET": lambda: store.find("s3://labels/busy") or store.read("s3://labels/busy"),
        "DELETE": lambda: store.delete("s3://labels/busy"),
    }.items():
        line.spoil(method, "503", times=2)
        act()
    assert all(rule.times == 0 for rule in line.rules)


def test_only_what_may_pass_is_asked_again(line: Relay, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.become(monkeypatch, s3.job)
    store = store_behind(line)
    for act, error in (
        (lambda: store.put("s3://raw/x", b""), AccessDenied),
        (lambda: store.info("s3://labels/nothing"), NotFound),
        (lambda: store.read("s3://labels/nothing"), NotFound),
    ):
        line.asked.clear()
        with pytest.raises(error):
            act()
        assert len(line.asked) == 1


@pytest.mark.parametrize("kind", ["503", "hang", "truncate"])
def test_reading_goes_on_where_it_failed(line: Relay, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 50_000)
    store = store_behind(line)
    version = store.put("s3://labels/long", DATA)
    with store.open("s3://labels/long", version) as file:
        begun = file.read(100_000)
        line.asked.clear()
        line.spoil("GET", kind)
        assert begun + b"".join(iter(lambda: file.read(40_000), b"")) == DATA
    assert all("GET" in request for request in line.asked), "the file is not looked up or opened again"
    line.spoil("GET", kind)
    assert store.read("s3://labels/long", version) == DATA


def test_a_write_without_an_answer_is_tried_again(line: Relay) -> None:
    store = store_behind(line)
    line.spoil("PUT", "hang")
    began = time.monotonic()
    version = store.put("s3://labels/x", b"content")
    assert time.monotonic() - began < 30, "long before the deadline of two minutes"
    assert (store.read("s3://labels/x"), store.info("s3://labels/x").version) == (b"content", version)


def test_a_write_that_gets_no_answer_at_all_ends_as_unknown(line: Relay) -> None:
    store = store_behind(line, deadline_s=1.0)
    line.spoil("PUT", "hang", times=100)
    began = time.monotonic()
    with pytest.raises(OutcomeUnknown, match="may have been written"):
        store.put("s3://labels/x", b"content")
    assert time.monotonic() - began < 20


def test_a_lost_answer_may_make_us_our_own_rival(line: Relay) -> None:
    """So whoever gets False reads what stands."""
    store = store_behind(line)
    line.spoil("PUT", "commit_then_reset")
    assert store.put_if_absent("s3://labels/mine", b"content") is False
    assert store.read("s3://labels/mine") == b"content"


def test_a_lost_answer_does_not_change_the_version(line: Relay) -> None:
    store = store_behind(line)
    line.spoil("PUT", "commit_then_reset")
    assert store.put("s3://labels/again", b"content") == store.info("s3://labels/again").version


def test_an_upload_in_parts_that_fails_leaves_nothing(
    line: Relay, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_SINGLE_PUT", 1)
    (tmp_path / "x").write_bytes(b"content")
    line.spoil("PUT", "503", times=100)
    with pytest.raises(OutcomeUnknown):
        store_behind(line, deadline_s=0.2).put("s3://labels/parts", tmp_path / "x")
    assert "Uploads" not in s3.client(s3.owner).list_multipart_uploads(Bucket="labels")
    with pytest.raises(NotFound):
        Store(Storage(endpoint_url=s3.endpoint_url)).info("s3://labels/parts")


def test_options_are_added_to_ours(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.become(monkeypatch, s3.owner)
    options = {"config_kwargs": {"s3": {"addressing_style": "path"}}, "endpoint_url": s3.endpoint_url}
    backend = storage._backend("s3://raw", Storage(options=options, read_timeout_s=3.0))
    assert isinstance(backend, remote.S3)
    assert backend.page("s3://raw", "", None, None) == ([], None)
    assert backend.fs.config_kwargs["read_timeout"] == 3.0
    assert backend.fs.config_kwargs["s3"] == {"addressing_style": "path"}


# --- Web servers ---------------------------------------------------------------------------------------------------


class Website(ThreadingHTTPServer):
    """Serves a folder on loopback: plainly, or with ranges and ETags; or answers with one status."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Page, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.has_ranges, self.refuses_ranges = True, False
        self.status: int | None = None
        self.has_lengths, self.sent = True, 0

    def handle_error(self, *args: object) -> None:
        """Quiet: a client that has read enough of a file hangs up."""


class _Page(SimpleHTTPRequestHandler):
    server: Website

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if self.server.status is not None:
            return self.send_error(self.server.status)
        if not self.server.has_lengths:
            self.send_response(200)
            self.end_headers()
            return path.open("rb")
        if not self.server.has_ranges or not path.is_file():
            return super().send_head()
        data = path.read_bytes()
        tag = f'"{hash(data):x}"'
        if self.headers.get("If-Match", tag) != tag:
            return self.send_error(412)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", tag)
        self.end_headers()
        return io.BytesIO(data[first : last + 1])

    def end_headers(self) -> None:
        if self.server.refuses_ranges:
            self.send_header("Accept-Ranges", "none")
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while data := source.read(100_000):
            outputfile.write(data)
            self.server.sent += len(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def website(tmp_path: Path) -> Iterator[Website]:
    with serving(Website(tmp_path)) as server:
        yield server


@pytest.mark.parametrize("has_ranges", [True, False])
def test_files_of_a_web_server(website: Website, tmp_path: Path, has_ranges: bool) -> None:
    website.has_ranges = has_ranges
    (tmp_path / "a b.bin").write_bytes(DATA)
    url = f"{website.url}/a b.bin?token=abc"
    info = Store().info(url)
    assert (info.url, info.size) == (url, len(DATA))
    for read_ahead in (True, False):
        with Store().open(url, info.version, read_ahead) as file:
            assert file.read(1000) == DATA[:1000]
            if has_ranges:
                assert file.seek(-1000, 2) == len(DATA) - 1000
                assert file.read() == DATA[-1000:]
    assert Store().read(url, info.version) == DATA
    assert [Store().read(url, limit=limit) for limit in (1000, 10**6)] == [DATA[:1000], DATA]
    (tmp_path / "a b.bin").write_bytes(DATA[:-1] + b"x")
    os.utime(tmp_path / "a b.bin", (0, 0))
    with pytest.raises(SourceChanged):
        Store().open(url, info.version)


@pytest.mark.parametrize("in_memory", [1000, 10**9])
def test_a_file_is_read_as_a_whole_from_a_server_that_takes_no_ranges(
    website: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", in_memory)
    website.has_ranges, website.refuses_ranges = False, True
    (tmp_path / "x").write_bytes(DATA)
    with Store().open(f"{website.url}/x") as file:
        assert file.seek(-1000, 2) == len(DATA) - 1000
        assert file.read() == DATA[-1000:]
    assert Store().read(f"{website.url}/x") == DATA


def test_of_a_file_without_a_length_no_more_is_read_than_an_image_may_have(
    website: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 1000)
    website.has_lengths = False
    for name, size in {"small.jpg": 1000, "large.jpg": 200_000_000}.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    config = Input(url=[f"{website.url}/small.jpg", f"{website.url}/large.jpg"])
    found = [sample for shard in discover(config, Store()) for sample in read(shard, config, Store())]
    assert [(sample.key, sample.reject and sample.reject.error) for sample in found] == [
        ("large.jpg", "member_too_large"),
        ("small.jpg", None),
    ]
    assert website.sent < 100_000_000  # what was under way is lost


def test_a_web_file_never_mixes_two_versions(website: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 1000)
    (tmp_path / "x").write_bytes(DATA)
    with Store().open(f"{website.url}/x") as file:
        file.read(1000)
        (tmp_path / "x").write_bytes(DATA[::-1])
        with pytest.raises(SourceChanged):
            file.read()


def test_a_web_server_without_ranges_is_told_apart(
    website: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 1000)
    website.has_ranges = False
    (tmp_path / "x").write_bytes(DATA)
    with Store().open(f"{website.url}/x") as file:
        file.read(1000)
        file.read(1000)
        with pytest.raises(ConfigError, match="range requests"):
            file.read()


@pytest.mark.parametrize(("status", "kind"), [(403, AccessDenied), (404, NotFound), (503, StoreUnavailable)])
def test_what_a_web_server_refuses(website: Website, status: int, kind: type[Exception]) -> None:
    website.status = status
    store = Store(Storage(deadline_s=0.3))
    for look in (store.info, store.open, store.read):
        with pytest.raises(kind) as failed:
            look(f"{website.url}/x.tar?X-Amz-Signature=abc")
        assert "abc" not in str(failed.value)


def test_a_web_server_that_is_down() -> None:
    with pytest.raises(StoreUnavailable, match="cannot read http://127"):
        Store(Storage(deadline_s=0.3)).read(f"http://127.0.0.1:{free_ports(1)[0]}/x")


def test_a_web_server_has_no_listings_and_takes_no_files(website: Website) -> None:
    for ask in (Store().find, lambda url: list(Store().each_match(url)), Store().starting_with):
        with pytest.raises(ConfigError, match="no listings"):
            ask(f"{website.url}/x*")
    with pytest.raises(ConfigError, match="an output is"):
        Store().put(f"{website.url}/x", b"")


def test_a_list_of_tars_on_a_web_server_is_input(website: Website, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("dog.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"dog"))
    (tmp_path / "list.txt").write_text(f"{website.url}/x.tar\n")
    config = Input(url=f"{website.url}/list.txt")
    (shard,) = discover(config, Store())
    assert [(sample.key, sample.data) for sample in read(shard, config, Store())] == [("dog", b"dog")]


# --- Whatever else fsspec reaches ----------------------------------------------------------------------------------


class Scratch(LocalFileSystem):  # type: ignore[misc]
    """Stands for a store that fsspec knows and we do not."""

    protocol = "scratch"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("scratch://").rstrip("/")


def test_a_listing_says_what_botocore_reads_in_it(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are parsed by a hook of ours, which takes less than half of the time."""
    s3.become(monkeypatch, s3.owner)
    client = s3.client(s3.owner)
    for key in ("odd/a b+ü%20&<.tar", "odd/deep/x.tar", "odd/y"):
        client.put_object(Bucket="raw", Key=key, Body=key.encode())
    theirs = client.list_objects_v2(Bucket="raw", Prefix="odd/")["Contents"]
    ours = Store(Storage(endpoint_url=s3.endpoint_url)).find("s3://raw/odd")
    found = [(info.url.removeprefix("s3://raw/"), info.size, info.version) for info in ours]
    assert found == sorted((entry["Key"], entry["Size"], entry["ETag"].strip('"')) for entry in theirs)
    assert len(found) == 3
    for body in (b"<ListBucketResult><Contents>", b""):
        answer, parsed = {"status_code": 200, "body": body}, dict[str, Any]()
        remote._take_contents(answer, parsed)
        assert (answer["body"], parsed) == (body, {}), "botocore says what is wrong with it"


def test_other_stores_are_for_reading(tmp_path: Path) -> None:
    fsspec.register_implementation("scratch", Scratch, clobber=True)
    for name in ("raw/a.tar", "raw/b.tar", "raw/deep/c.tar", "raw2/d.tar"):
        Store().put(str(tmp_path / name), name.encode())
    base = f"scratch://{tmp_path}"
    urls = [f"{base}/{name}" for name in ("raw/a.tar", "raw/b.tar", "raw/deep/c.tar")]
    assert [info.url for info in Store().find(f"{base}/raw")] == urls
    assert sorted(info.url for info in Store().each_match(f"{base}/raw/*.tar")) == urls[:2]
    assert sorted(info.url for info in Store().each_match(f"{base}/raw/**/c*")) == urls[2:]
    assert [info.url for info in Store().starting_with(f"{base}/raw/b")] == urls[1:2]
    assert Store().find(f"{base}/nothing") == []
    info = Store().info(urls[0])
    assert Store().find(f"{base}/raw")[0] == info
    assert Store().read(info.url, info.version) == b"raw/a.tar"
    with pytest.raises(NotFound):
        Store().info(f"{base}/raw")
    for act in (Store().delete, lambda url: Store().put(url, b""), lambda url: Store().put_if_absent(url, b"")):
        with pytest.raises(ConfigError, match="an output is"):
            act(f"{base}/raw/a.tar")


@pytest.mark.parametrize(("url", "says"), [("gs://bucket/x", "install gcsfs"), ("nonsense://x", "not known")])
def test_stores_that_cannot_be_reached_are_named_with_the_remedy(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Store().read(url)


def test_options_that_make_no_sense_are_an_error_of_the_config(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.become(monkeypatch, s3.owner)
    for options in ({"endpoint_url": "no url"}, {"config_kwargs": {"nonsense": 1}}):
        with pytest.raises(ConfigError, match=r"nonsense|no url"):
            Store(Storage(options=options)).read("s3://raw/x")
