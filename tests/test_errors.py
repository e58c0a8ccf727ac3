"""What a store raises becomes an error of ours that says what to do next."""

from __future__ import annotations

import errno
import io
from typing import Any

import aiohttp
import pytest
from botocore import exceptions as boto
from fsspec.exceptions import FSTimeoutError
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.errors import translate_boto_error
from s3fs.utils import FileExpired
from yarl import URL

from pipeline import errors
from pipeline.errors import (
    AccessDenied,
    ConfigError,
    ExitCode,
    FatalError,
    NotFound,
    OutcomeUnknown,
    PipelineError,
    PreconditionFailed,
    SourceChanged,
    StoreFull,
    StoreUnavailable,
    clean,
    redact,
    translate,
)

S3_CODES = {
    AccessDenied: (
        *("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"),
        *("TokenRefreshRequired", "AllAccessDisabled", "RequestTimeTooSkewed", "403", "400", "401"),
    ),
    ConfigError: ("NoSuchBucket", "InvalidBucketName", "PermanentRedirect", "301", "AuthorizationHeaderMalformed"),
    FatalError: ("NotImplemented", "501"),
    NotFound: ("NoSuchKey", "404"),
    PreconditionFailed: ("PreconditionFailed", "412"),
    StoreFull: ("507", "QuotaExceeded", "XMinioStorageFull"),
    StoreUnavailable: (
        *("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted", "500", "503"),
        *("ConditionalRequestConflict", "409", "SomethingNew"),
    ),
}


def client_error(code: str) -> boto.ClientError:
    return boto.ClientError({"Error": {"Code": code, "Message": "what the server says"}}, "PutObject")


@pytest.mark.parametrize(("code", "kind"), [(code, kind) for kind, codes in S3_CODES.items() for code in codes])
def test_the_code_of_an_s3_answer_decides(code: str, kind: type[PipelineError]) -> None:
    """Also where s3fs has made another exception of it, and where a newer botocore has a class for it."""
    raised = client_error(code)
    modeled = type(code, (boto.ClientError,), {})(raised.response, "PutObject")
    found = [translate(error, "write", "s3://b/x") for error in (raised, modeled, translate_boto_error(raised))]
    if code not in ("AllAccessDisabled", "RequestTimeTooSkewed"):  # these two are known by s3fs
        assert {type(error) for error in found} == {kind}
    assert type(found[-1]) is kind
    assert "what the server says" in str(found[-1])
    assert str(found[-1]).startswith("cannot write s3://b/x: ")


class OwnTimeout(boto.ReadTimeoutError):
    pass


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (boto.NoCredentialsError(), AccessDenied),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), AccessDenied),
        (boto.ProfileNotFound(profile="x"), AccessDenied),
        (boto.UnauthorizedSSOTokenError(), AccessDenied),
        (boto.TokenRetrievalError(provider="x", error_msg="y"), AccessDenied),
        (boto.ParamValidationError(report="Invalid bucket name"), ConfigError),
        (boto.EndpointConnectionError(endpoint_url="http://x"), StoreUnavailable),
        (boto.ConnectionClosedError(endpoint_url="http://x"), StoreUnavailable),
        (boto.ReadTimeoutError(endpoint_url="http://x"), StoreUnavailable),
        (OwnTimeout(endpoint_url="http://x"), StoreUnavailable),
        (boto.FlexibleChecksumError(error_msg="x"), StoreUnavailable),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailable),
        (aiohttp.ClientPayloadError("x"), StoreUnavailable),
        (aiohttp.ServerDisconnectedError(), StoreUnavailable),
        (FSTimeoutError(), StoreUnavailable),
        (TimeoutError(), StoreUnavailable),
        (aiohttp.InvalidURL("http://:x"), ConfigError),
        (FileExpired("x", "tag"), SourceChanged),
        (FileNotFoundError(2, "No such file"), NotFound),
        (IsADirectoryError(21, "Is a directory"), NotFound),
        (NotADirectoryError(20, "Not a directory"), NotFound),
        (FileExistsError(17, "File exists"), PreconditionFailed),
        (PermissionError(13, "Permission denied"), AccessDenied),
        (OSError(errno.EROFS, "Read-only file system"), AccessDenied),
        (OSError(errno.ENOSYS, "Function not implemented"), FatalError),
        (OSError(errno.EOPNOTSUPP, "Operation not supported"), FatalError),
        (OSError(errno.ELOOP, "Too many levels"), ConfigError),
        (OSError(errno.ENAMETOOLONG, "File name too long"), ConfigError),
        (OSError(errno.ENOSPC, "No space left"), StoreFull),
        (OSError(errno.EDQUOT, "Quota exceeded"), StoreFull),
        (OSError("whatever"), StoreUnavailable),
        (ConnectionResetError(104, "reset"), StoreUnavailable),
        (ValueError("Protocol not known"), ConfigError),
        (RuntimeError("nobody knows"), StoreUnavailable),
    ],
)
def test_else_its_class_or_the_nearest_above_it(cause: BaseException, kind: type[PipelineError]) -> None:
    assert type(translate(cause, "read", "s3://b/x")) is kind


def response_error(status: int) -> aiohttp.ClientResponseError:
    url = URL("http://h/x.tar?X-Amz-Signature=abc")
    request = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(request, (), status=status, message="what the server says")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AccessDenied), (403, AccessDenied), (404, NotFound), (410, NotFound), (412, PreconditionFailed)]
    + [(status, StoreUnavailable) for status in (429, 500, 502, 503, 504)],
)
def test_the_status_of_a_web_server_decides(status: int, kind: type[PipelineError]) -> None:
    """Though fsspec calls all of them "not found"."""
    disguised = FileNotFoundError("http://h/x.tar?X-Amz-Signature=abc")
    disguised.__cause__ = response_error(status)
    for cause in (response_error(status), disguised):
        error = translate(cause, "read", "http://h/x.tar?X-Amz-Signature=abc")
        assert type(error) is kind
        assert "what the server says" in str(error)
        assert "abc" not in str(error)


def test_errors_of_ours_stay_as_they_are() -> None:
    ours = SourceChanged("x changed")
    assert translate(ours, "read", "s3://b/x") is ours


def test_every_name_in_the_table_exists() -> None:
    """A renamed class of a library would silently become transient."""
    known: set[str] = {c.__name__ for c in vars(boto).values() if isinstance(c, type)}
    known |= {c.__name__ for c in vars(aiohttp).values() if isinstance(c, type)}
    known |= {"FSTimeoutError", "FileExpired", *vars(__import__("builtins"))}
    assert set(errors._TYPES) - known == set()


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, ExitCode.USAGE),
        (AccessDenied, ExitCode.FAILED),
        (NotFound, ExitCode.FAILED),
        (StoreUnavailable, ExitCode.INCOMPLETE),
        (StoreFull, ExitCode.INCOMPLETE),
        (OutcomeUnknown, ExitCode.INCOMPLETE),
        (SourceChanged, ExitCode.INCOMPLETE),
    ],
)
def test_exit_codes(kind: type[PipelineError], code: ExitCode) -> None:
    assert kind("x").exit_code == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/we?ird@home.tar", "s3://bucket/we?ird@home.tar"),
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("https://me:secret@host/x?X-Amz-Signature=abc&y=z", "https://host/x"),
        ("url='https://host/x?sig=abc%20d', at https://u@h/y", "url='https://host/x', at https://h/y"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (OSError(f"cannot identify image file {io.BytesIO()!r}"), "cannot identify image file <bytes>"),
        (RuntimeError("object at 0x7f00ab in\n  two   lines."), "object in two lines"),
        (ValueError(), "ValueError"),
        ("GET http://me:pw@host/x?token=abc failed", "GET http://host/x failed"),
    ],
)
def test_clean(cause: Any, expected: str) -> None:
    assert clean(cause) == expected


def test_clean_is_short() -> None:
    assert len(clean("x" * 10_000)) == 500
