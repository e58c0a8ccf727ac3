"""What can go wrong, grouped by what to do next, and one table that brings foreign errors into it.

    PipelineError                 a sentence for the person who reads it, and an exit code
    ├── ConfigError               2  the config, the command line or the input listing: fix it and run again
    ├── FatalError                1  running again will not help: credentials, weights, another model's dataset
    │   ├── AccessDenied
    │   ├── ModelMismatch
    │   └── WeightsError
    ├── TransientError            3  a store that is down: what is committed stays, run again
    │   ├── StoreUnavailable
    │   ├── StoreFull                no room: never tried again, since nothing frees itself
    │   ├── Stopped                  a run that gave up early: its error budget, workers that only die
    │   └── OutcomeUnknown           a write whose answer was lost: it may stand
    ├── NotFound                     the file does not exist
    ├── PreconditionFailed           a conditional write lost against another one
    └── SourceChanged                a shard is no longer the one that was planned

Bad images are not errors of the program: they are `Reject`s, and become error rows.
"""

from __future__ import annotations

import enum
import errno
import re


class ExitCode(enum.IntEnum):
    """What the process ends with."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    INCOMPLETE = 3


class PipelineError(Exception):
    """Base of all errors that are meant to be read: one sentence on what was wrong and what to do."""

    exit_code = ExitCode.FAILED


class ConfigError(PipelineError):
    exit_code = ExitCode.USAGE


class FatalError(PipelineError):
    pass


class AccessDenied(FatalError):
    pass


class ModelMismatch(FatalError):
    pass


class WeightsError(FatalError):
    pass


class TransientError(PipelineError):
    exit_code = ExitCode.INCOMPLETE


class StoreUnavailable(TransientError):
    pass


class StoreFull(TransientError):
    pass


class Stopped(TransientError):
    pass


class OutcomeUnknown(TransientError):
    pass


class NotFound(PipelineError):
    pass


class PreconditionFailed(PipelineError):
    pass


class SourceChanged(PipelineError):
    exit_code = ExitCode.INCOMPLETE


class Reject(Exception):
    """Why a sample has no prediction: the stage (read, decode, predict), one of the classes in docs/errors.md, and a
    message for people."""

    def __init__(self, stage: str, error: str, message: str) -> None:
        super().__init__(stage, error, message)
        self.stage, self.error, self.message = stage, error, message

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


# What a store's answer says: S3's error codes, and HTTP statuses, which is all that an answer to HEAD has.
_CODES: dict[str, type[PipelineError]] = {
    "400": AccessDenied,  # S3's answer to a HEAD with an expired token
    "401": AccessDenied,
    "403": AccessDenied,
    "AccessDenied": AccessDenied,
    "ExpiredToken": AccessDenied,
    "Forbidden": AccessDenied,
    "InvalidAccessKeyId": AccessDenied,
    "InvalidToken": AccessDenied,
    "SignatureDoesNotMatch": AccessDenied,
    "TokenRefreshRequired": AccessDenied,
    "301": ConfigError,  # another region
    "AuthorizationHeaderMalformed": ConfigError,  # another region
    "InvalidBucketName": ConfigError,
    "KeyTooLongError": ConfigError,
    "NoSuchBucket": ConfigError,
    "PermanentRedirect": ConfigError,
    "404": NotFound,
    "410": NotFound,
    "NoSuchKey": NotFound,
    "304": PreconditionFailed,  # of some MinIO
    "412": PreconditionFailed,
    "PreconditionFailed": PreconditionFailed,
    "501": FatalError,
    "NotImplemented": FatalError,
    "507": StoreFull,
    "QuotaExceeded": StoreFull,
    "XMinioStorageFull": StoreFull,
}

_ERRNOS: dict[int, type[PipelineError]] = {
    errno.ELOOP: ConfigError,
    errno.ENAMETOOLONG: ConfigError,
    errno.EROFS: AccessDenied,
    errno.ENOSYS: FatalError,  # a file system without links or locks
    errno.EOPNOTSUPP: FatalError,
    errno.EDQUOT: StoreFull,
    errno.ENOSPC: StoreFull,
}

# Class names along the MRO, so that no store's library is imported here just to name its errors.
_TYPES: dict[str, type[PipelineError]] = {
    "NoCredentialsError": AccessDenied,
    "PartialCredentialsError": AccessDenied,
    "PermissionError": AccessDenied,
    "ProfileNotFound": AccessDenied,
    "SSOError": AccessDenied,
    "TokenRetrievalError": AccessDenied,
    "InvalidURL": ConfigError,
    "RedirectClientError": ConfigError,  # a web server that sends on to what is no web address
    "ParamValidationError": ConfigError,
    "ValueError": ConfigError,  # what fsspec and botocore say to a URL or an option that makes no sense
    "FileNotFoundError": NotFound,
    "IsADirectoryError": NotFound,
    "NotADirectoryError": NotFound,
    "FileExistsError": PreconditionFailed,
    "FileExpired": SourceChanged,
    "ClientError": StoreUnavailable,
    "ClientPayloadError": StoreUnavailable,
    "ConnectionClosedError": StoreUnavailable,
    "EndpointConnectionError": StoreUnavailable,
    "FlexibleChecksumError": StoreUnavailable,
    "FSTimeoutError": StoreUnavailable,
    "HTTPClientError": StoreUnavailable,
    "OSError": StoreUnavailable,
}

_ADVICE: dict[type[PipelineError], str] = {
    AccessDenied: "Check the credentials in this environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role)"
    " and that they have not expired and cover this prefix; on a disk, the permissions.",
    ConfigError: "Check the URL and the storage section of the config.",
    FatalError: "It lacks what this needs (on a disk: hard links and locks). Use another place.",
    NotFound: "Check the spelling, and that it exists.",
    StoreUnavailable: "Run again when the store answers; what is committed stays.",
    StoreFull: "Free space and run again; what is committed stays.",
    SourceChanged: "It changed while it was read; the next run takes the new version.",
}


def translate(cause: BaseException, doing: str, url: str) -> PipelineError:
    """The error of our tree that says what `cause`, raised by a store while `doing` something to `url`, means.

    The store's own code or status decides; else an errno, else the first known class name along the MRO. Whatever no
    table knows is taken as transient: retrying costs little, calling it permanent could lose work.
    """
    if isinstance(cause, PipelineError):
        return cause
    if isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__  # fsspec says so whatever went wrong with a web server
    kind = _kind_by_code(cause) or _kind_by_errno(cause) or _kind_by_name(cause) or StoreUnavailable
    advice = _ADVICE.get(kind, "")
    # Timeouts often have no text of their own.
    what = "no answer in time" if isinstance(cause, TimeoutError) and not str(cause) else clean(cause)
    return kind(f"cannot {doing} {redact(url)}: {what}. {advice}".rstrip())


def _kind_by_code(cause: BaseException) -> type[PipelineError] | None:
    for error in (cause, cause.__cause__):
        response = getattr(error, "response", None)  # botocore's
        if isinstance(response, dict):
            return _CODES.get(str(response.get("Error", {}).get("Code")))
    return _CODES.get(str(getattr(cause, "status", None)))  # aiohttp's


def _kind_by_errno(cause: BaseException) -> type[PipelineError] | None:
    return _ERRNOS.get(cause.errno or 0) if isinstance(cause, OSError) else None


def _kind_by_name(cause: BaseException) -> type[PipelineError] | None:
    return next((_TYPES[c.__name__] for c in type(cause).__mro__ if c.__name__ in _TYPES), None)


def clean(cause: object) -> str:
    """One line of text without memory addresses or secrets, so that the same failure always reads the same."""
    text = str(cause) or type(cause).__name__
    text = re.sub(r"<_io\.\w+ object at 0x[0-9a-f]+>", "<bytes>", text)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return redact(" ".join(text.split()))[:500].rstrip(". ")


PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
# Of the form `?name=value`: a lone `?` is a wildcard, or part of a name. It may carry a signature.
QUERY = re.compile(r"(\w://[^\s?'\"<>]*)\?[\w.%-]+=[^\s'\"<>)]*")


def redact(text: str) -> str:
    """A URL, or text with URLs in it, without `user:password@` and without query strings."""
    return QUERY.sub(r"\1", PASSWORD.sub("", text))


def has_password(url: str) -> bool:
    return PASSWORD.search(url) is not None
