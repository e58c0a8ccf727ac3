"""What a run says: a live bar or a line every few seconds while it runs, a table and `report.json` at its end."""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.config import JobConfig, each_text
from pipeline.errors import ExitCode, redact
from pipeline.inputs.shards import printable

if TYPE_CHECKING:
    from pipeline.outputs.commit import Committed
    from pipeline.planning import Task

log = logging.getLogger("pipeline")

LINE_EVERY_S = 5.0
MIN_STEADY_S = 1.0
MAX_ARRIVALS = 1000


@dataclass
class RunReport:
    """What a run did. `report.json` holds all of it; times are in seconds."""

    run_id: str
    output_url: str
    exit_code: ExitCode = ExitCode.COMPLETE
    message: str = ""
    model_fingerprint: str = ""
    engine: str = ""
    device: str = ""
    batch_size: int = 0
    actors: int = 0
    shards_listed: int = 0
    shards_done_before: int = 0
    shards_committed: int = 0
    shards_gone: int = 0
    predicted: int = 0
    errors: int = 0
    bytes_written: int = 0
    started_at: str = ""  # UTC
    seconds: float = 0.0
    images_per_s: float = 0.0  # over the second half of the images
    verdict: str = ""  # what bounded the run, and what to change
    usage: dict[str, Any] = field(default_factory=dict)  # see verdict.Usage
    prediction: dict[str, float] = field(default_factory=dict)  # see estimation.score
    committed: list[str] = field(default_factory=list)  # shard URLs
    open: list[dict[str, str]] = field(default_factory=list)  # shard URL and reason
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Names that are not UTF-8 stay as JSON's `\\udcff`."""
        return printable(json.dumps(asdict(self), indent=1, ensure_ascii=False))

    def __str__(self) -> str:
        return self.message


def new_run_id(now: datetime) -> str:
    """Sorts by time (UTC); chance tells apart what begins in the same second."""
    return f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"


def public_config(config: JobConfig) -> dict[str, Any]:
    """The resolved config as it may be shown: passwords and queries are cut out of URLs. The input has no secrets, and
    its queries are part of its shards' names."""
    resolved = config.model_dump(mode="json")
    # What overrides says what it was given and no more: its defaults would override as well.
    for section, name in (("input", "storage"), ("output", "storage"), ("model", "transform")):
        override = getattr(getattr(config, section), name)
        if override is not None:
            resolved[section][name] = override.model_dump(mode="json", exclude_unset=True)
    shown: dict[str, Any] = each_text(resolved, lambda text: redact(text) if "://" in text else text)
    shown["input"]["url"] = config.input.url
    return shown


Clock = Callable[[], float]  # seconds


class Counter:
    """Follows a run for its report; the base of what shows progress."""

    def __init__(self, report: RunReport, num_shards: int, num_bytes: int, clock: Clock = time.monotonic) -> None:
        self.report = report
        self.clock = clock
        self.num_shards, self.num_bytes = num_shards, num_bytes
        self.settled = 0  # shards committed or given up
        self.bytes_settled = 0
        self.images = self.errors = 0  # arrived, whether committed or not; error rows are among the images
        self._started = clock()
        self._arrivals: list[tuple[float, int]] = []  # when so many images had arrived

    def on_rows(self, rows: int, errors: int) -> None:
        self.images += rows
        self.errors += errors
        if not rows:
            return
        self._arrivals.append((self.clock(), self.images))
        if len(self._arrivals) > MAX_ARRIVALS:
            del self._arrivals[1:-1:2]

    def on_committed(self, task: Task, committed: Committed) -> None:
        self._settle(task.shard.size)
        if not committed.is_ours:
            self.report.shards_done_before += 1
            return
        self.report.shards_committed += 1
        self.report.predicted += committed.predicted
        self.report.errors += committed.errors
        self.report.bytes_written += committed.num_bytes
        self.report.committed.append(redact(task.shard.url))

    def on_open(self, task: Task, reason: str) -> None:
        self._settle(task.shard.size)
        self._leave_open(task, reason)
        log.warning("shard %s stays open: %s", redact(task.shard.url), redact(reason))

    def on_unfinished(self, tasks: Sequence[Task]) -> None:
        """The run ends before these shards were complete."""
        for task in tasks:
            self._leave_open(task, "the run ended before it was complete")

    def on_tick(self) -> None:
        """Called several times a second."""

    def _leave_open(self, task: Task, reason: str) -> None:
        self.report.open.append({"shard": redact(task.shard.url), "reason": redact(reason)})

    def _settle(self, size: int) -> None:
        self.settled += 1
        self.bytes_settled += size

    @property
    def images_per_s(self) -> float:
        """In steady state: over the second half of the images, since the first blocks were decoded while the actors
        started; where that is too short to tell, from the start of the flow."""
        if not self._arrivals:
            return 0.0
        last_at, images = self._arrivals[-1]
        half_at, half = next(arrival for arrival in self._arrivals if 2 * arrival[1] >= images)
        if last_at - half_at < MIN_STEADY_S:
            return images / max(last_at - self._started, 1e-3)
        return (images - half) / (last_at - half_at)

    @property
    def seconds_left(self) -> float | None:
        """By the share of bytes that is through; None before the first shard is."""
        if not self.bytes_settled:
            return None
        return (self.clock() - self._started) * (self.num_bytes - self.bytes_settled) / self.bytes_settled

    def status(self) -> str:
        """`12/40 shards · 3,456 images · 812 images/s · 2 errors`"""
        if not self.images and not self.settled:
            return f"starting · {counted(self.num_shards, 'shard')} to do"
        return (
            f"{self.settled}/{self.num_shards} shards · {self.images:,} images · {self.images_per_s:,.0f} images/s"
            f" · {counted(self.errors, 'error')}"
        )

    def line(self) -> str:
        """The status, and the time left: by our own estimate, since rich's follows the last seconds, and shards end in
        bursts."""
        left = self.seconds_left
        return self.status() + (f" · {_duration(left)} left" if left is not None else "")


class LogLines(Counter):
    """For a log file: a line every few seconds."""

    def __init__(self, report: RunReport, num_shards: int, num_bytes: int, clock: Clock = time.monotonic) -> None:
        super().__init__(report, num_shards, num_bytes, clock)
        self._said = self._started

    def on_tick(self) -> None:
        now = self.clock()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            log.info("%s", self.line())


class LiveBar(Counter):
    """For a terminal: one line that moves."""

    def __init__(self, report: RunReport, num_shards: int, num_bytes: int, console: Console) -> None:
        super().__init__(report, num_shards, num_bytes)
        self.progress = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
        self._task = self.progress.add_task("starting", total=max(num_bytes, 1))

    def on_tick(self) -> None:
        self.progress.update(self._task, completed=self.bytes_settled, description=self.line())


@contextmanager
def watching(report: RunReport, num_shards: int, num_bytes: int) -> Iterator[Counter]:
    """A live bar where stderr is a terminal, else log lines."""
    if not sys.stderr.isatty():
        yield LogLines(report, num_shards, num_bytes)
        return
    bar = LiveBar(report, num_shards, num_bytes, Console(stderr=True))
    with bar.progress:
        yield bar


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, noun: str) -> str:
    """Such as "1 shard" and "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summary(report: RunReport) -> Table:
    """The table that ends a run."""
    rows = {
        "result": f"{report.exit_code.name.lower()}: {report.message}",
        "output": report.output_url,
        "shards": f"{report.shards_committed} committed, {report.shards_done_before} done before,"
        f" {len(report.open)} open, {report.shards_gone} gone from the input",
        "images": f"{report.predicted:,} predicted, {report.errors:,} errors",
        "speed": f"{report.images_per_s:,.0f} images/s, {report.seconds:.1f} s in all",
        "engine": f"{report.engine} on {report.device}, batches of {report.batch_size}, {report.actors} actor(s)",
        "written": f"{report.bytes_written / 1e6:,.1f} MB",
    }
    if report.verdict:
        rows["bound by"] = report.verdict
    if report.prediction:
        rows["predicted"] = (
            f"{report.prediction['predicted_seconds']:.1f} s, {report.prediction['error']:+.0%} of what it took;"
            f" {report.prediction['predicted_images_per_s']:,.0f} images/s"
        )
    if not report.shards_committed:
        for name in ("images", "speed", "engine", "written"):
            del rows[name]
    return facts(rows)


def facts(rows: dict[str, str]) -> Table:
    """Names and values side by side. Nothing is cut off, and brackets in a value are no markup."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table
