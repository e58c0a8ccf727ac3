"""Every fault that a store can have, for a while and for good, in front of every call of `Store`.

Each call has a deadline. What passes is not noticed; what stays is one sentence that names the file and the next step.
"""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from pipeline import remote
from pipeline.config import Input, Storage
from pipeline.errors import AccessDenied, ConfigError, NotFound, OutcomeUnknown, StoreFull, StoreUnavailable
from pipeline.inputs import tars
from pipeline.inputs.readers import read
from pipeline.inputs.shards import discover
from pipeline.storage import Store
from tests.support.disks import small_disk
from tests.support.relay import Relay, relay
from tests.support.s3 import S3Server, s3_server
from tests.support.tars import tar

DATA = bytes(range(256)) * 800
SHORT = {"connect_timeout_s": 1.0, "read_timeout_s": 0.4, "deadline_s": 2.5}
OVERTIME_S = 3.0  # an attempt that begins just before the deadline has one second; the rest is for a busy machine
AT_ONCE = 60  # calls


def open_and_read(store: Store, url: str) -> bytes:
    with store.open(url) as file:
        return file.read(1000) + file.read()


READS: dict[str, Callable[[Store, str], Any]] = {
    "find": lambda store, url: [info.url for info in store.find(url.rpartition("/")[0])],
    "each_match": lambda store, url: sorted(info.url for info in store.each_match(url.rpartition("/")[0] + "/*")),
    "starting_with": lambda store, url: [info.url for info in store.starting_with(url)],
    "info": lambda store, url: store.info(url).size,
    "open": open_and_read,
    "read": lambda store, url: store.read(url),
}
WRITES: dict[str, Callable[[Store, str], Any]] = {
    "put": lambda store, url: store.put(url, b"new") and store.read(url),
    # A refusal may be our own lost write, so that only what stands counts.
    "put_if_absent": lambda store, url: (
        store.put_if_absent(url + ".new", b"new") in (True, False) and store.read(url + ".new")
    ),
    "delete": lambda store, url: store.delete(url),
}
ACTS = READS | WRITES
WITH_A_BODY = ("find", "each_match", "starting_with", "open", "read")
LISTINGS = ("find", "each_match", "starting_with")

# What may pass when a call is made again, and what does not.
BEFORE = ("reset", "hang", "500", "503", "slowdown", "409")
IN_THE_BODY = ("truncate", "midreset", "midhang")
REFUSALS = ("expired", "denied", "no_bucket")
PASSING = [*product(BEFORE, ACTS), *product((*IN_THE_BODY, "slow"), WITH_A_BODY)]
REFUSED = [*product(REFUSALS, ACTS)]


@dataclass(frozen=True)
class Outcome:
    value: Any
    error: Exception | None
    seconds: float


def outcome(act: Callable[[Store, str], Any], store: Store, url: str) -> Outcome:
    began = time.monotonic()
    try:
        value, error = act(store, url), None
    except Exception as raised:  # noqa: BLE001 - the tests look at it
        value, error = None, raised
    return Outcome(value, error, time.monotonic() - began)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def line(s3: S3Server) -> Iterator[Relay]:
    with pytest.MonkeyPatch.context() as patch, relay(s3.endpoint_url) as found:
        s3.become(patch, s3.owner)
        yield found


Outcomes = dict[tuple[str, str], Outcome]


def play(
    line: Relay, s3: S3Server, cases: list[tuple[str, str]], times: int | None, slow_s: float, **patience: float
) -> Outcomes:
    """Each call on a file of its own, whose requests are spoiled; all at once, since most of the time is waiting."""
    store = Store(Storage(endpoint_url=line.url, **SHORT | patience))
    assert store.find("s3://labels/nothing") == []  # the connection stands
    client = s3.client(s3.owner)
    urls = {case: f"s3://labels/{case[0]}-{case[1]}-{times}/x" for case in cases}
    for (kind, act), url in urls.items():
        client.put_object(Bucket="labels", Key=url.removeprefix("s3://labels/"), Body=DATA)
        methods = "GET" if kind in (*IN_THE_BODY, "slow", "flip") else ".*"
        line.spoil(methods, kind, times, path=rf"[/=]{kind}-{act}-{times}(/|%2F)", seconds=slow_s)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = pool.map(lambda case: outcome(ACTS[case[1]], store, urls[case]), cases)
        found = dict(zip(cases, answers, strict=True))
    line.heal()
    return found


@pytest.fixture(scope="module")
def passing(line: Relay, s3: S3Server) -> Outcomes:
    return play(line, s3, PASSING, times=1, slow_s=1.0, deadline_s=20.0)


@pytest.fixture(scope="module")
def lasting(line: Relay, s3: S3Server) -> Outcomes:
    return play(line, s3, PASSING, times=None, slow_s=60.0)


@pytest.fixture(scope="module")
def refused(line: Relay, s3: S3Server) -> Outcomes:
    """Apart from what hangs, and with time for an answer."""
    return play(line, s3, REFUSED, times=None, slow_s=60.0, read_timeout_s=5.0, deadline_s=20.0)


RIGHT: dict[str, Any] = {
    **{"info": len(DATA), "open": DATA, "read": DATA, "put": b"new", "put_if_absent": b"new", "delete": None}
}


@pytest.mark.parametrize(("kind", "act"), PASSING)
def test_what_passes_is_not_noticed(passing: Outcomes, kind: str, act: str):
    found = passing[kind, act]
    assert found.error is None
    expected = [f"s3://labels/{kind}-{act}-1/x"] if act in LISTINGS else RIGHT[act]
    assert found.value == expected


@pytest.mark.parametrize(("kind", "act"), PASSING)
def test_what_stays_ends_before_the_deadline_with_a_sentence(lasting: Outcomes, kind: str, act: str):
    found = lasting[kind, act]
    assert type(found.error) is (OutcomeUnknown if act.startswith("put") else StoreUnavailable), found
    assert re.match(rf"cannot (list|look up|open|read|write|delete) s3://labels/{kind}-{act}-None", str(found.error))
    assert "Run again when the store answers; what is committed stays." in str(found.error)
    assert found.seconds < SHORT["deadline_s"] + OVERTIME_S


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["expired", "denied"])
def test_refusals_are_not_tried_again(refused: Outcomes, kind: str, act: str):
    """Also where the answer is to a HEAD and has a bare 400 for an expired token."""
    found = refused[kind, act]
    assert type(found.error) is AccessDenied
    assert re.search(rf"s3://labels/{kind}-{act}-None.*Check the credentials.*have not expired", str(found.error))
    assert found.seconds < OVERTIME_S


@pytest.mark.parametrize("act", ACTS)
def test_a_missing_bucket_is_no_empty_listing(refused: Outcomes, act: str):
    """An answer to HEAD can't tell it from a missing file."""
    found = refused["no_bucket", act]
    assert type(found.error) is (NotFound if act in ("info", "open") else ConfigError)
    assert re.search(rf"s3://labels/no_bucket-{act}-None.*Check the (URL|spelling)", str(found.error))
    assert found.seconds < OVERTIME_S


def test_a_hanging_store_is_named_as_such(lasting: Outcomes):
    for act in ACTS:
        assert re.search(r"no answer in time|[Tt]imeout", str(lasting["hang", act].error)), act


def test_a_store_that_is_down_is_not_waited_for_again_and_again(line: Relay):
    """A thousand shards would each wait for the whole deadline. It is as long as ever once the store has answered."""
    store = Store(Storage(endpoint_url=line.url, connect_timeout_s=0.1, read_timeout_s=5.0, deadline_s=2.0))
    while outcome(ACTS["find"], store, "s3://labels/down/x").error:  # a busy machine takes longer to connect
        pass
    for lowest, highest in ((0.9, 2.0 + OVERTIME_S), (0.0, 0.9)):
        line.spoil(".*", "500", times=None, path="down")
        found = outcome(lambda store, url: store.find(url), store, "s3://labels/down")
        assert type(found.error) is StoreUnavailable
        assert lowest < found.seconds < highest
    line.heal()
    while outcome(ACTS["find"], store, "s3://labels/down/x").error:
        pass
    line.spoil(".*", "500", times=None, path="down")
    assert outcome(lambda store, url: store.find(url), store, "s3://labels/down").seconds > 0.9
    line.heal()


# --- Writes that are more than one request, or whose answer is lost ---------------------------------------------------


@pytest.mark.parametrize(("method", "what"), [("POST", "uploads"), ("PUT", "partNumber"), ("POST", "uploadId")])
def test_an_upload_in_parts_has_a_deadline_too(
    line: Relay, s3: S3Server, method: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "MAX_SINGLE_PUT", 1)
    (tmp_path / "x").write_bytes(DATA)
    line.spoil(method, "hang", times=None, path=f"parts-{method}.*{what}")
    store = Store(Storage(endpoint_url=line.url, connect_timeout_s=0.5, read_timeout_s=0.2, deadline_s=1.0))
    found = outcome(lambda store, url: store.put(url, tmp_path / "x"), store, f"s3://labels/parts-{method}")
    assert type(found.error) is OutcomeUnknown, found
    assert found.seconds < 1.0 + 2 * OVERTIME_S
    assert "Uploads" not in s3.client(s3.owner).list_multipart_uploads(Bucket="labels")


def test_an_expired_token_is_known_by_a_bare_400(line: Relay):
    """All that an answer to HEAD has."""
    line.spoil("HEAD", "expired", path="bare")
    with pytest.raises(AccessDenied, match="Bad Request.*have not expired"):
        Store(Storage(endpoint_url=line.url, **SHORT)).info("s3://labels/bare")


def test_our_own_write_may_refuse_us_but_never_another_version(line: Relay):
    """What to make of False is said where it is used: whoever gets it reads what stands."""
    store = Store(Storage(endpoint_url=line.url, **SHORT))
    line.spoil("PUT", "commit_then_reset", times=2, path="/mine")
    assert store.put_if_absent("s3://labels/mine", b"ours") is False
    version = store.put("s3://labels/mine", b"theirs")
    assert store.put_if_absent("s3://labels/mine", b"ours") is False
    assert store.read("s3://labels/mine", version) == b"theirs"


def test_a_store_that_ignores_conditions_is_found_out(line: Relay, s3: S3Server, tmp_path: Path):
    direct = Store(Storage(endpoint_url=s3.endpoint_url))
    assert direct.honours_conditions("s3://labels/_runs/1/probe")
    assert Store().honours_conditions(str(tmp_path / "_runs" / "1" / "probe"))
    behind = Store(Storage(endpoint_url=line.url, **SHORT))
    line.spoil("PUT", "commit_then_reset", path="probe")
    assert behind.honours_conditions("s3://labels/_runs/2/probe"), "our own lost write is no sign of anything"
    line.spoil("PUT", "200", nth=2, path="probe")
    assert not behind.honours_conditions("s3://labels/_runs/3/probe")
    line.spoil("PUT", "304", nth=2, path="probe")
    assert behind.honours_conditions("s3://labels/_runs/4/probe"), "so some MinIO says that something stands there"
    assert direct.find("s3://labels/_runs") == []
    assert list((tmp_path / "_runs").rglob("probe")) == []


# --- Bits that flip on the way ----------------------------------------------------------------------------------------


def shard_on(line: Relay, s3: S3Server, name: str, data: bytes) -> Callable[[], list[Any]]:
    """Puts a shard into the store; a function that reads it through the line."""
    s3.client(s3.owner).put_object(Bucket="raw", Key=name, Body=data)
    store = Store(Storage(endpoint_url=line.url, deadline_s=30.0))
    config = Input(url=f"s3://raw/{name}")
    (shard,) = discover(config, store)
    return lambda: [(s.index, s.key, s.data, s.reject and s.reject.error) for s in read(shard, config, store)]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "truncated.tar"])
def test_a_bit_that_flips_in_a_tar_leaves_the_shard_open(
    line: Relay, s3: S3Server, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Wherever it is: in a header, an image, a member that is skipped, or behind the end; never wrong bytes, and no
    damage recorded that the store does not have."""
    monkeypatch.setattr(remote, "READ_AHEAD", 30_000)
    monkeypatch.setattr(tars, "TAR_BUFFER", 10_000)
    data = tar(("a.jpg", os.urandom(50_000)), ("a.bin", os.urandom(150_000)), ("b.jpg", os.urandom(40_000)))
    data = {"tar": data + bytes(60_000), "tar.gz": gzip.compress(data, 1), "truncated.tar": data[:220_000]}[kind]
    read_shard = shard_on(line, s3, f"flipped.{kind}", data)
    expected = read_shard()
    for number in count(1):
        rule = line.spoil("GET", "flip", nth=number, path="flipped")
        outcome_ = outcome(lambda *_: read_shard(), Store(), "")
        line.heal()
        if rule.times:  # there are fewer requests than that
            break
        assert type(outcome_.error) is StoreUnavailable, number
        assert re.search(r"s3://raw/flipped.*arrived damaged.*https://.*run again", str(outcome_.error))
    assert number > 3
    assert outcome_.value == expected


@pytest.mark.parametrize("checksum", [True, False])
def test_a_bit_that_flips_in_a_loose_file_is_noticed(line: Relay, s3: S3Server, checksum: bool):
    """Whether the store has a checksum of it, as its writer gave one, or not."""
    read_shard = shard_on(line, s3, "loose.jpg", DATA)
    if not checksum:
        plain = s3.client(s3.owner)
        plain.meta.config.request_checksum_calculation = "when_required"
        plain.put_object(Bucket="raw", Key="loose.jpg", Body=DATA)
    line.spoil("GET", "flip", path="loose")
    assert read_shard() == [(0, "loose.jpg", DATA, None)], "once: it is asked for again"
    store = Store(Storage(endpoint_url=line.url, **SHORT | {"deadline_s": 2}))
    store.info("s3://raw/loose.jpg")
    line.spoil("GET", "flip", times=None, path="loose")
    with pytest.raises(StoreUnavailable, match="loose.jpg.*" + ("checksum" if checksum else "arrived damaged")):
        store.read("s3://raw/loose.jpg")
    line.heal()


# --- A disk that is full ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_at_once(tmp_path: Path):
    (tmp_path / "large").write_bytes(bytes(2**21))
    with small_disk(tmp_path) as disk:
        Store().put(str(disk / "old"), b"old")
        for write in (
            lambda: Store().put(str(disk / "old"), tmp_path / "large"),
            lambda: Store().put(str(disk / "new"), bytes(2**21)),
            lambda: Store().put_if_absent(str(disk / "new"), bytes(2**21)),
        ):
            began = time.monotonic()
            with pytest.raises(
                StoreFull, match="cannot write .*No space left.*Free space and run again; what is committed"
            ):
                write()
            assert time.monotonic() - began < 5, "nothing frees itself"
        assert [path.name for path in disk.iterdir()] == ["old"]
        assert (disk / "old").read_bytes() == b"old"
