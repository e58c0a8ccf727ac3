"""The job's policy allows every request that our storage makes on the night's input and output, and none outside."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import botocore.session
import pytest
from botocore import xform_name

from pipeline import remote
from pipeline.config import Input, Storage, load_config
from pipeline.errors import NotFound
from pipeline.inputs.shards import discover
from pipeline.storage import Store
from tests.support.web import serving

INFRA = Path(__file__).parents[2] / "infra"
ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
NOTHING = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
Request = tuple[str, str, str | None]  # action, bucket[/key], prefix of a listing


class EmptyStore(ThreadingHTTPServer):
    """Buckets without objects, and the requests that were made on them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[Request] = []


class _Handler(BaseHTTPRequestHandler):
    server: EmptyStore
    protocol_version = "HTTP/1.1"  # which answers `Expect: 100-continue`: without, a PUT waits for ever

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        listing = parse_qs(url.query) if "list-type" in url.query else None
        action = "s3:ListBucket" if listing else ACTIONS[self.command]
        self.server.requests.append((action, url.path.strip("/"), listing["prefix"][0] if listing else None))
        body = NOTHING if listing else b""
        self.send_response(200 if listing or self.command == "PUT" else 404)
        self.send_header("ETag", '"0cc175b9c0f1b6a831c399e269772661"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def empty() -> Iterator[EmptyStore]:
    with serving(EmptyStore()) as server:
        yield server


@pytest.fixture
def store(empty: EmptyStore, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    return Store(Storage(endpoint_url=f"http://127.0.0.1:{empty.server_port}", deadline_s=10.0))


def allowed(request: Request) -> bool:
    """What IAM says: some statement names the action and matches the resource and, of a listing, the prefix."""
    action, path, prefix = request
    for statement in json.loads((INFRA / "aws" / "iam" / "job-policy.json").read_text())["Statement"]:
        actions, resources = (
            [value] if isinstance(value, str) else value for value in (statement["Action"], statement["Resource"])
        )
        wanted = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*")
        prefixes = [wanted] if isinstance(wanted, str) else wanted
        if (
            action in actions
            and any(fnmatchcase(f"arn:aws:s3:::{path}", resource) for resource in resources)
            and any(fnmatchcase(prefix or "", wanted) for wanted in prefixes)
        ):
            return True
    return False


def test_every_request_of_a_night_is_allowed(store: Store, empty: EmptyStore) -> None:
    config = load_config(INFRA / "kubernetes" / "nightly.yaml")
    (source,), output = config.input.urls, config.output.url
    discover(Input(url=source.rpartition("/")[0], allow_empty=True), store)
    part = f"{output}/data/part.parquet"
    list(store.each_match(source))
    for folder in ("", "/_ledger", "/data", "/errors"):
        store.find(output + folder)
    store.put(part, b"a")
    store.put_if_absent(f"{output}/_dataset.json", b"a")
    store.delete(part)
    with pytest.raises(NotFound):
        store.read(source.replace("*", "one"))
    assert {action for action, _, _ in empty.requests} == {"s3:ListBucket", *ACTIONS.values()}
    assert [request for request in empty.requests if not allowed(request)] == []
    # Of what is not there S3 says 404 to who may list with the key as the prefix, and 403 to all others.
    keys = [path.partition("/")[::2] for action, path, _ in empty.requests if action == "s3:GetObject"]
    assert [key for bucket, key in keys if not allowed(("s3:ListBucket", bucket, key))] == []


# Each call of S3 that our storage makes, and the action that it needs.
NEEDS = {
    "list_objects_v2": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
}


def policy_actions(name: str) -> set[str]:
    found = [statement["Action"] for statement in json.loads((INFRA / "aws" / "iam" / name).read_text())["Statement"]]
    return {action for actions in found for action in ([actions] if isinstance(actions, str) else actions)}


def calls_of_s3() -> set[str]:
    """The operations that stand as texts in the only module that speaks with S3."""
    model = botocore.session.get_session().get_service_model("s3")
    known = {xform_name(operation) for operation in model.operation_names}
    return known & set(re.findall(r'"(\w+)"', inspect.getsource(remote)))


def test_the_policy_allows_what_the_code_calls_and_nothing_else() -> None:
    assert calls_of_s3() == NEEDS.keys()
    assert policy_actions("job-policy.json") == set(NEEDS.values())


def test_the_page_lists_every_call_and_action() -> None:
    page = (INFRA.parent / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| `(s3:\w+)` \| (.+?) \|", page, re.MULTILINE)
    assert {action for action, _ in rows} == policy_actions("job-policy.json")
    assert {call: action for action, calls in rows for call in re.findall(r"`(\w+)`", calls)} == NEEDS
    listed = set(re.findall(r"^\| `((?:ec2|iam):\w+)` \|", page, re.MULTILINE))
    assert listed == policy_actions("head-policy.json")


def test_nothing_outside_is_allowed() -> None:
    config = load_config(INFRA / "kubernetes" / "nightly.yaml")
    raw, labels = (url.removeprefix("s3://").partition("/")[0] for url in (config.input.urls[0], config.output.url))
    assert not allowed(("s3:PutObject", config.input.urls[0].removeprefix("s3://"), None))
    assert not allowed(("s3:GetObject", f"{labels}/other/part.parquet", None))
    for bucket in (raw, labels):
        assert not allowed(("s3:ListBucket", bucket, ""))
