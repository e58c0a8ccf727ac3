"""Ray's side of `deaths.py`: an actor that keeps the book, and what became of the processes that wrote in it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state
from ray._private.worker import global_worker
from ray.core.generated.common_pb2 import WorkerExitType  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import WorkerTableData  # type: ignore[attr-defined]

from pipeline.deaths import Deaths, Fate, Notes
from pipeline.errors import Stopped
from pipeline.failures import readable
from pipeline.timing import Spent

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
SILENCE_S = 60.0  # before it is said what there is to wait for
STALL_S = 60.0
MEMORY_KILLS = 5  # within a stall; Ray waits twice as long after each
OTHER_DEATHS = 100  # more than it takes to find several samples that kill
FIRST_DEATHS = 25  # of workers that never got anything done
REPORTED_WITHIN_S = 1.0  # how long Ray may take to note a death
OWN_FAULT = (WorkerExitType.SYSTEM_ERROR, WorkerExitType.USER_ERROR)


class Witness:
    """Keeps the book, in an actor that survives the workers. Should it die itself, everybody is innocent again."""

    def __init__(self) -> None:
        self._deaths, self._spent, self._lock = Deaths(fate_of), Spent(), threading.Lock()

    def begin(self, work: str, process: str) -> int:
        with self._lock:
            return self._deaths.begin(work, process)

    def end(self, work: str, process: str) -> None:
        with self._lock:
            self._deaths.end(work, process)

    def spend(self, spent: Spent) -> None:
        with self._lock:
            self._spent += spent

    def spent(self) -> Spent:
        """By all processes so far."""
        return self._spent


class RayNotes(Notes):
    """`Notes` of whatever worker it is used in. Work that is done for the first time is not noted, since nobody can
    have died of it: a note costs a message, and only what Ray does again can be what killed."""

    def __init__(self, witness: Any) -> None:
        self._witness = witness

    def begin(self, work: str) -> int:
        if _is_first_attempt():
            return 0
        # Not ray.get, which in a task gives the CPU away while it waits, for another task to take.
        answer: int = self._witness.begin.remote(work, _this_process()).future().result()
        return answer

    def end(self, work: str) -> None:
        if not _is_first_attempt():
            self._witness.end.remote(work, _this_process())

    def spend(self, spent: Spent) -> None:
        self._witness.spend.remote(spent)

    def die(self, reason: str) -> None:
        log.error("this worker makes way for another: %s", reason)
        signal.raise_signal(signal.SIGKILL)


def _is_first_attempt() -> bool:
    """Whether Ray does this task for the first time."""
    attempt: int = global_worker.core_worker.get_current_task_attempt_number()  # type: ignore[attr-defined]
    return attempt == 0


def _this_process() -> str:
    context = ray.get_runtime_context()
    return f"{context.get_node_id()} {context.get_worker_id()}"


def fate_of(process: str) -> Fate:
    """What has become of a worker, as Ray's control store has it. Also called from a process that just came up in its
    place, before its death is noted: so a worker that seems alive is looked at for a while."""
    node_id, worker_id = process.split(" ")
    deadline = time.monotonic() + REPORTED_WITHIN_S
    while True:
        worker = _worker(worker_id)
        if not _is_node_alive(node_id):
            return Fate.EXCUSED
        if worker is not None and not worker.is_alive:
            return Fate.DEAD if worker.exit_type in OWN_FAULT else Fate.EXCUSED
        if time.monotonic() > deadline:
            return Fate.ALIVE
        time.sleep(0.05)


class Casualties:
    """Ends a run whose workers only die: Ray itself would start them again for ever."""

    def __init__(self) -> None:
        self.on_progress()
        self._too_many = FIRST_DEATHS

    def on_progress(self) -> None:
        self._too_many = OTHER_DEATHS
        self._before: Counter[str] | None = None
        self._looked_at = self._progressed_at = time.monotonic()

    def check(self) -> None:
        """Raise Stopped where nothing but deaths has happened for long. Looks every few seconds at the most."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        found = _deaths_of_this_job()
        self._before = found if self._before is None else self._before
        since = found - self._before
        if self._looked_at - self._progressed_at < STALL_S:
            return
        if since["memory"] >= MEMORY_KILLS:
            raise Stopped(
                f"Ray's memory monitor killed {since['memory']} workers, and nothing got done meanwhile: a node has too"
                " little memory for this job. Lower runtime.batch_size or input.max_pixels, give Ray fewer CPUs, or"
                " end what else uses memory."
            )
        if since["other"] >= self._too_many:
            raise Stopped(
                f"{since['other']} workers died, and nothing got done meanwhile. Often that is for want of memory, as"
                " while a network is loaded, or a GPU is in trouble. The log above, or Ray's own, may say why."
            )


def wait_for(answer: Any) -> Any:
    """`ray.get`, unless those who work on the answer only die. Raises an error of ours for whatever a task raised, or
    its worker died of."""
    casualties, began, is_said = Casualties(), time.monotonic(), False
    try:
        while not ray.wait([answer], timeout=1)[0]:
            casualties.check()
            if not is_said and time.monotonic() - began >= SILENCE_S:
                is_said = True
                say_what_is_free("no answer of a worker")
        return ray.get(answer)
    except ray.exceptions.RayError as cause:
        raise readable(cause) from cause


def say_what_is_free(lacking: str) -> None:
    """A network that loads for ever and a device that others hold look alike from here."""
    with suppress(ray.exceptions.RayError):
        free, there = ray.available_resources(), ray.cluster_resources()
        kinds = ["CPU", "GPU"] if "GPU" in there else ["CPU"]
        log.warning(
            "%s after %.0f s: a network is still loading or being calibrated, the input is slow, or others hold what is"
            " needed (%s are free; `ray status` tells more)",
            *(lacking, SILENCE_S),
            ", ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}s" for kind in kinds),
        )


def _deaths_of_this_job() -> Counter[str]:
    job = ray.get_runtime_context().get_job_id()
    workers = map(WorkerTableData.FromString, state._connect_and_get_accessor().get_worker_table())
    kinds = [worker.exit_type for worker in workers if not worker.is_alive and worker.job_id.hex() == job]
    memory = kinds.count(WorkerExitType.NODE_OUT_OF_MEMORY)
    return Counter(memory=memory, other=sum(kind in OWN_FAULT for kind in kinds))


def _worker(worker_id: str) -> Any:
    found = state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
    return WorkerTableData.FromString(found) if found else None


def _is_node_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
