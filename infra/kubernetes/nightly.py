"""Starts the night's RayJob, named by its date, and waits for its end: what the CronJob's pod runs.

    python nightly.py rayjob.yaml

It ends with the run's own exit code: 0 complete, 1 failed, 2 bad usage or config, 3 incomplete but resumable.
Whoever comes second for a date (a pod that replaces another, a start by hand) finds the RayJob there and waits too.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml

IDENTITY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SERVER = "https://kubernetes.default.svc"
PAUSE_S = 15.0
REQUEST_TIMEOUT_S = 30.0
# The operator gave up waiting: what is committed stays, and the next run goes on from there.
OUT_OF_TIME = ("DeadlineExceeded", "PreRunningDeadlineExceeded")


class Api:
    """The RayJobs of this pod's namespace. A server that can't answer is asked again until the Job's deadline."""

    def __init__(self, server: str = SERVER, identity: Path = IDENTITY, pause_s: float = PAUSE_S) -> None:
        namespace = (identity / "namespace").read_text().strip()
        self.url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self.identity = identity
        self.pause_s = pause_s
        self.tls = ssl.create_default_context(cafile=identity / "ca.crt") if server.startswith("https:") else None

    def create(self, rayjob: Mapping[str, Any]) -> bool:
        """False where one of that name exists. An answer that was lost is safe: asking again then says so."""
        try:
            self._ask("POST", self.url, json.dumps(rayjob).encode())
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise
            return False
        return True

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", f"{self.url}/{name}").get("status") or {}
        return found

    def _ask(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        while True:
            # Read each time, since the token is replaced every hour.
            headers = {
                "Authorization": f"Bearer {(self.identity / 'token').read_text().strip()}",
                "Content-Type": "application/json",
            }
            request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - http in tests only
            try:
                with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=self.tls) as answer:  # noqa: S310
                    found: dict[str, Any] = json.load(answer)
                    return found
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise
                say(f"the Kubernetes API answers {error.code}; asking again in {self.pause_s:g} s")
            except (OSError, http.client.HTTPException, ValueError) as error:
                say(f"the Kubernetes API can't be reached ({error}); asking again in {self.pause_s:g} s")
            time.sleep(self.pause_s)


def tonight(rayjob: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The RayJob under the name of today's date, owned by the Job that starts it and so removed with it."""
    date = datetime.now(ZoneInfo(environment["TIME_ZONE"])).strftime("%Y%m%d")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": environment["JOB_NAME"], "uid": environment["JOB_UID"]}
    metadata = rayjob["metadata"] | {"name": f"{rayjob['metadata']['name']}-{date}", "ownerReferences": [owner]}
    return rayjob | {"metadata": metadata}


def exit_code(status: Mapping[str, Any]) -> int | None:
    """How the run ended, or None while it has not. A RayJob keeps the run's exit code as text only."""
    deployment = status.get("jobDeploymentStatus")
    if deployment == "Complete":  # so are runs that somebody stopped
        return 0 if status.get("jobStatus") == "SUCCEEDED" else 3
    if deployment == "ValidationFailed":
        return 2
    if deployment != "Failed":
        return None
    said = re.match(r"Job entrypoint command failed with exit code ([123])\b", str(status.get("message", "")))
    if said:
        return int(said[1])
    return 3 if status.get("reason") in OUT_OF_TIME else 1


def wait(api: Api, name: str) -> int:
    """The exit code of the run, once it has ended."""
    while True:
        status = api.status(name)
        code = exit_code(status)
        if code is not None:
            first_line = str(status.get("message") or "").partition("\n")[0]
            say(f"{name}: {status.get('jobDeploymentStatus')}, exit code {code}. {first_line}".rstrip())
            return code
        time.sleep(api.pause_s)


def main(template: Path, api: Api) -> int:
    rayjob = tonight(yaml.safe_load(template.read_text()), os.environ)
    name = rayjob["metadata"]["name"]
    try:
        say(f"{name}: {'started' if api.create(rayjob) else 'exists already; waiting for that one'}")
        return wait(api, name)
    except urllib.error.HTTPError as error:
        say(f"{name}: the Kubernetes API refuses with {error.code}: {error.read().decode(errors='replace')}")
        return 1


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the pod's log is its only voice


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Api()))
