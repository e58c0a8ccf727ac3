"""What Ray says of a failure, as an error of ours: what was wrong, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    StreamingGeneratorReplayInconsistentError,
    UserCodeException,
    WorkerCrashedError,
)

from pipeline import errors
from pipeline.errors import PipelineError, Stopped, clean

MEMORY = "Often that is for want of memory: lower runtime.batch_size, or give Ray fewer CPUs"
FULL = (
    "Ray's object store is full on a node, and so is the disk that it spills to (RAY_TMPDIR, else /tmp). Free space"
    " there; what is committed stays."
)
MEANINGS: dict[type[BaseException], str] = {
    OutOfDiskError: FULL,
    ObjectStoreFullError: FULL,
    WorkerCrashedError: f"a worker died. {MEMORY}",
    RayActorError: f"a worker died. {MEMORY}",
    StreamingGeneratorReplayInconsistentError: "a node died, and a shard that it had read was another one, or could not"
    " be reached, when it was read again",
}


def readable(error: BaseException) -> BaseException:
    """Our own error inside what Ray wraps around it, or one that says what Ray's means. Others than Ray's stay."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, PipelineError) and not isinstance(cause, RayError):
            return cause
    if not isinstance(error, RayError):
        return error
    last = causes[-1]
    if isinstance(last, UserCodeException) or (isinstance(last, RayActorError) and "creation task" in str(last)):
        return _told(str(error))
    for kind, text in MEANINGS.items():
        if isinstance(last, kind):
            return Stopped(text)
    return _failed(type(last).__name__, str(last))


def _told(text: str) -> PipelineError:
    """What an actor raised, by its traceback: Ray keeps no more of it than that text. Where one error came of another,
    that of ours; else the first."""
    raised = [_raised(part) for part in text.split("\n\nThe above exception was the direct cause")]
    for module, name, message in reversed(raised):
        kind = getattr(errors, name, None) if module == errors.__name__ else None
        if isinstance(kind, type) and issubclass(kind, PipelineError):
            return kind(message)
    _, name, message = raised[0]
    return _failed(name, message)


def _raised(traceback: str) -> tuple[str, str, str]:
    """Module, name and message of the error at the end of a traceback."""
    found = re.search(r"^([\w.]+)(?:: (.*))?$", traceback.rpartition('\n  File "')[2], re.MULTILINE)
    module, _, name = (found[1] if found else "").rpartition(".")
    return module, name, (found[2] if found else None) or traceback


def _failed(name: str, message: str) -> Stopped:
    return Stopped(f"a worker failed with {name}: {clean(message)}. --debug shows where")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came of. What comes of a task is a RayTaskError that is also of its cause's class."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__
