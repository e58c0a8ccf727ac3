"""The same run as a Ray job: what travels to the cluster, and how its log and exit code come back."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from pipeline.config import JobConfig, each_text
from pipeline.config_errors import has_secret
from pipeline.error_classes import choose_classes
from pipeline.errors import ConfigError, ExitCode, FatalError, Stopped, clean, redact
from pipeline.model.classes import class_names
from pipeline.model.source import locate
from pipeline.model.spec import with_absolute_weights

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENTRYPOINT = "python -m pipeline run config.yaml"
STOP_WAIT_S = "60"  # between SIGTERM and SIGKILL when the job is stopped: a run commits what it can
RECONNECTS = 5
NO_PYTHON = (126, 127)  # of the shell: what it was to start is not executable, or not there
INTERPOLATION = re.compile(r"(\\*)\$\{")


def submit_job(
    config: JobConfig, address: str, wait: bool, submission_id: str | None, retry_errors: Iterable[str] | str = ()
) -> int | str:
    """See `pipeline.api.submit`. A submission id that the cluster knows already is followed, not started again."""
    address = dashboard(address)
    classes = ",".join(sorted(choose_classes(retry_errors)))
    entrypoint = f"{ENTRYPOINT} --retry-errors {classes}" if classes else ENTRYPOINT
    with tempfile.TemporaryDirectory(prefix="resnet-batch-") as folder:
        pack(config, Path(folder))
        with _answering(address):
            client = _client(address)
            job = submission_id if submission_id and _is_known(client, submission_id) else None
            if job is None:
                environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S}}
                job = client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=environment)
    print(f"job {job} on {redact(address)}", file=sys.stderr)
    return follow(client, job) if wait else job


def dashboard(address: str) -> str:
    """The URL of a Ray dashboard; `host:port` is one as well. Raises ConfigError for what is none: Ray would try for
    most of a minute, or look for a module of that name."""
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        is_one = url.scheme in ("http", "https") and url.hostname and (url.port or "://" in address)
    except ValueError:
        is_one = False
    if not is_one:
        raise ConfigError(f"address: {redact(address)!r} is not that of a Ray dashboard, such as http://head:8265.")
    return url.geturl()


def pack(config: JobConfig, folder: Path) -> None:
    """Put into a folder all that the job needs of this machine: config, custom network, class names, this program.

    Data and weights do not travel: they are read from where the config says, which a relative path of this machine
    says no longer in the job's folder, so that it becomes absolute. Secrets don't either: the cluster has
    identities of its own. Raises ConfigError for weights whose URL holds one.
    """
    if has_secret(config.model.weights):
        raise ConfigError(
            f"model.weights: {redact(config.model.weights)} comes with a password or a signature, which the cluster"
            " would keep in its files. Let the cluster's own identity read the weights (s3://), or leave them there."
        )
    data = with_absolute_weights(config).model_dump(mode="json", exclude_unset=True)
    names = class_names(config.model.classes, config.directory, config.storage)
    if names is not None:
        data["model"]["classes"] = list(names)
    # Resolved it is already, and a name in a file of class names could otherwise read the environment of the cluster.
    literal = each_text(data, lambda text: INTERPOLATION.sub(r"\1\1\\${", text))
    OmegaConf.save(OmegaConf.create(literal), folder / "config.yaml")
    if config.model.is_custom:
        for name, content in locate(config.model.name, config.directory).files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    package = Path(__file__).parent
    shutil.copytree(package, folder / package.name, ignore=_ignored)


def _ignored(folder: str, names: list[str]) -> list[str]:
    """What lies in the program's folder and is not part of it, such as an editor's copies or a `.env`."""

    def belongs(name: str) -> bool:
        if Path(folder, name).is_dir():
            return name.isidentifier() and name != "__pycache__"
        return name == "template.yaml" or (Path(name).suffix in (".py", ".safetensors") and name[0] != ".")

    return [name for name in names if not belongs(name)]


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's log as it comes; its exit code at the end.

    Runs in a thread with an event loop of its own, since a notebook cell is inside a running one. A stopped job has
    no exit code; what it committed stays, so it counts as incomplete. Raises Stopped where the job runs on unfollowed.
    """
    ended: Future[Any] = Future()

    def tail() -> None:
        try:
            ended.set_result(asyncio.run(_tail(client, job)))
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            ended.set_exception(error)

    threading.Thread(target=tail, daemon=True).start()
    try:
        info = ended.result()
    except KeyboardInterrupt:
        raise Stopped(
            f"no longer following job {job}, which runs on: `ray job logs --follow {job}`, `ray job stop {job}`."
        ) from None
    except _dropped() as cause:
        raise Stopped(
            f"lost the log of job {job}: {clean(cause)}. It may run on: `ray job logs --follow {job}`."
        ) from cause
    if info.driver_exit_code in list(ExitCode):
        return int(info.driver_exit_code)
    # Without an exit code, or with the shell's, it never ran, or was stopped; with another one its driver was killed.
    is_resumable = str(info.status) == "STOPPED" or info.driver_exit_code not in (None, *NO_PYTHON)
    print(f"job {job} {str(info.status).lower()}: {info.message}", file=sys.stderr)
    return int(ExitCode.INCOMPLETE if is_resumable else ExitCode.FAILED)


async def _tail(client: JobSubmissionClient, job: str) -> Any:
    """What is known of the job once it has ended. A connection that drops is opened again; what was shown is
    skipped."""
    shown = failures = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                if fresh:
                    print(fresh, end="", flush=True)
                    shown, failures = seen, 0
            info: Any = client.get_job_info(job)
            if info.status.is_terminal():
                return info
            raise ConnectionError("the connection was closed before the job's end")
        except _dropped():
            failures += 1
            if failures > RECONNECTS:
                raise
            await asyncio.sleep(2 ** (failures - 1))


def _dropped() -> tuple[type[Exception], ...]:
    """What a connection to a dashboard that goes away raises."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError  # of a token that has expired meanwhile

    return RuntimeError, OSError, ClientError, AuthenticationError


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would override the address that was asked for
        return JobSubmissionClient(address, headers=headers)


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """A sentence for whatever keeps a dashboard from taking a job."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (OSError, RuntimeError, ValueError, AuthenticationError) as cause:
        raise FatalError(
            f"cannot submit to the Ray dashboard at {redact(address)}: {clean(cause)}. Check the address (often a"
            " port-forward to 8265), and the token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        ) from cause


def _token() -> str | None:
    """From where Ray takes it; sent as a header, since Ray itself looks only once, when it is imported."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.is_file() else None


@contextmanager
def _without(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _is_known(client: JobSubmissionClient, job: str) -> bool:
    return any(info.submission_id == job for info in client.list_jobs())
