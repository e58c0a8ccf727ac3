"""What a run says while it runs and at its end."""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import make_config
from pipeline.errors import ExitCode
from pipeline.inputs.shards import Shard, shard_id
from pipeline.model.spec import make_spec
from pipeline.outputs.commit import Committed
from pipeline.planning import Task
from pipeline.report import Counter, LiveBar, LogLines, RunReport, facts, public_config, summary, watching

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def task(url: str, size: int) -> Task:
    return Task(Shard(url, shard_id(url), "webdataset", "0", size))


def report() -> RunReport:
    return RunReport("20260131T020304Z-0123abcd", "s3://bucket/labels")


def drawn(console: Console) -> str:
    text = console.export_text()
    return "\n".join(line.rstrip() for line in text.splitlines())


# --- Counting ------------------------------------------------------------------------------------------------------


def test_committed_and_open_shards_are_counted_in_the_report(clock: Clock):
    counter = Counter(report(), 3, 300, clock)
    counter.on_rows(12, 2)
    counter.on_committed(task("s3://b/1.tar", 100), Committed(10, 2, 5000))
    counter.on_committed(task("s3://b/2.tar", 50), Committed(7, 0, 300))
    counter.on_open(task("s3://b/3.tar", 150), "the store is down")
    found = counter.report
    assert (found.shards_committed, found.predicted, found.errors, found.bytes_written) == (2, 17, 2, 5300)
    assert found.committed == ["s3://b/1.tar", "s3://b/2.tar"]
    assert found.open == [{"shard": "s3://b/3.tar", "reason": "the store is down"}]
    assert (counter.settled, counter.bytes_settled) == (3, 300)
    assert counter.status() == "3/3 shards · 12 images · 12,000 images/s · 2 errors"


def test_what_another_run_has_committed_meanwhile_is_none_of_ours(clock: Clock):
    counter = Counter(report(), 2, 300, clock)
    counter.on_committed(task("s3://b/1.tar", 100), Committed(10, 2, 5000, is_ours=False))
    found = counter.report
    assert (found.shards_done_before, found.shards_committed, found.predicted, found.committed) == (1, 0, 0, [])
    assert counter.settled == 1


def test_the_config_of_a_report_lists_the_same_input():
    """Signatures are cut out, but other queries are part of the name."""
    urls = ["https://host/a.tar?v=2", "s3://bucket/b.tar"]
    job = make_config(
        {"input": {"url": urls}, "output": {"url": "out"}, "model": {"weights": "https://host/a.pth?sig=x"}}
    )
    shown = public_config(job)
    assert shown["input"]["url"] == urls
    assert shown["model"]["weights"] == "https://host/a.pth"


def test_what_is_read_from_a_report_is_the_same_job():
    """Also where a section overrides a part of another: the preset's resize is not that of an empty transform."""
    job = make_config(
        {
            "input": {"url": "in", "storage": {"options": {"anon": True}}},
            "output": {"url": "out", "storage": {"deadline_s": 7}},
            "model": {"name": "resnet50", "weights": "IMAGENET1K_V2", "transform": {"crop": 200}},
            "storage": {"endpoint_url": "http://127.0.0.1:9", "read_timeout_s": 3},
        }
    )
    again = make_config(json.loads(json.dumps(public_config(job))))
    assert make_spec(again).fingerprint == make_spec(job).fingerprint
    assert (again.input_storage, again.output_storage) == (job.input_storage, job.output_storage)


def test_the_rate_is_that_of_the_steady_state(clock: Clock):
    """Over the second half of the images: the first was in part made while all was starting up."""
    counter = Counter(report(), 1, 1, clock)
    assert counter.images_per_s == 0
    clock.now += 60  # starting up
    counter.on_rows(32, 0)
    for _ in range(10):
        clock.now += 1
        counter.on_rows(100, 1)
    clock.now += 3  # nothing arrives, which is no part of the rate
    counter.on_rows(0, 0)
    assert counter.images_per_s == pytest.approx(100)
    assert (counter.images, counter.errors) == (1032, 10)


def test_what_was_decoded_while_the_actors_started_does_not_count(clock: Clock):
    counter = Counter(report(), 1, 1, clock)
    clock.now += 10
    for _ in range(20):  # a backlog, gone in a moment
        clock.now += 0.01
        counter.on_rows(100, 0)
    for _ in range(4000):
        clock.now += 0.1
        counter.on_rows(5, 0)
    assert counter.images_per_s == pytest.approx(50, rel=0.02)


def test_a_run_too_short_for_a_steady_state_is_measured_from_its_start(clock: Clock):
    counter = Counter(report(), 1, 1, clock)
    clock.now += 4
    counter.on_rows(40, 0)
    clock.now += 0.5
    counter.on_rows(5, 0)
    assert counter.images_per_s == pytest.approx(45 / 4.5)


def test_the_time_left_follows_the_bytes_that_are_through(clock: Clock):
    counter = Counter(report(), 4, 1000, clock)
    clock.now += 10
    counter.on_rows(500, 0)
    assert counter.seconds_left is None
    counter.on_committed(task("a", 200), Committed(1, 0, 1))
    assert counter.seconds_left == pytest.approx(40)
    clock.now += 10
    counter.on_open(task("b", 300), "gone")
    assert counter.seconds_left == pytest.approx(20)


def test_one_error_is_one_error(clock: Clock):
    counter = Counter(report(), 1, 1, clock)
    counter.on_rows(5, 1)
    assert counter.status().endswith("· 1 error")


def test_passwords_and_signatures_in_urls_are_cut_out(clock: Clock, caplog: pytest.LogCaptureFixture):
    url = "https://user:hunter2@host/1.tar?Signature=hunter2"
    counter = Counter(report(), 2, 2, clock)
    counter.on_committed(task(url, 1), Committed(1, 0, 1))
    counter.on_open(task(url, 1), f"cannot read {url}: it is gone")
    assert "hunter2" not in counter.report.to_json() + caplog.text
    assert counter.report.committed == ["https://host/1.tar"]
    assert "shard https://host/1.tar stays open: cannot read https://host/1.tar" in caplog.text


# --- In a log, in a terminal ---------------------------------------------------------------------------------------


def test_a_log_gets_a_line_every_few_seconds(clock: Clock, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "pipeline")
    lines = LogLines(report(), 2, 100, clock)
    for tick in range(121):  # half a minute, four times a second
        clock.now = 1000 + tick / 4
        lines.on_rows(10, 0)
        if tick == 60:
            lines.on_committed(task("a", 50), Committed(600, 0, 1))
        lines.on_tick()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 6
    assert said[0] == "0/2 shards · 210 images · 40 images/s · 0 errors"
    assert said[-1] == "1/2 shards · 1,210 images · 40 images/s · 0 errors · 0:30 left"


def test_a_terminal_gets_a_bar_that_moves():
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=120, color_system=None)
    bar = LiveBar(report(), 4, 1000, console)
    with bar.progress:
        bar.on_tick()
        bar.progress.refresh()
        empty = drawn(console)
        for number in range(3):
            bar.on_rows(1200, 1)
            bar.on_committed(task(f"{number}", 250), Committed(1199, 1, 10))
        bar.on_tick()
        bar.progress.refresh()
        full = drawn(console)
    assert "starting · 4 shards to do" in empty
    assert re.search(r"3/4 shards · 3,600 images · [\d,]+ images/s · 3 errors · 0:0\d left", full), full
    bars = [line.count("━") for line in full.splitlines() if "shards" in line]
    assert bars[-1] == 30, "three quarters of 40"


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, LiveBar), (False, LogLines)])
def test_what_shows_progress_depends_on_where_stderr_goes(
    is_terminal: bool, kind: type[Counter], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    with watching(report(), 1, 1) as counter:
        assert type(counter) is kind


# --- At the end ----------------------------------------------------------------------------------------------------


def finished() -> RunReport:
    found = report()
    found.message = "2 of 3 shards committed, 1 left open. Run again: it does only these."
    found.exit_code = ExitCode.INCOMPLETE
    found.engine, found.device, found.batch_size, found.actors = "openvino", "cpu", 32, 1
    found.shards_committed, found.shards_done_before, found.shards_gone = 2, 7, 1
    found.predicted, found.errors, found.bytes_written = 12345, 6, 7_800_000
    found.images_per_s, found.seconds = 812.4, 20.06
    found.open = [{"shard": "s3://b/3.tar", "reason": "down"}]
    return found


def shown(found: RunReport, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(summary(found))
    return drawn(console)


def test_the_summary_says_how_it_ended():
    assert shown(finished()) == "\n".join(
        [
            "result   incomplete: 2 of 3 shards committed, 1 left open. Run again: it does only these.",
            "output   s3://bucket/labels",
            "shards   2 committed, 7 done before, 1 open, 1 gone from the input",
            "images   12,345 predicted, 6 errors",
            "speed    812 images/s, 20.1 s in all",
            "engine   openvino on cpu, batches of 32, 1 actor(s)",
            "written  7.8 MB",
        ]
    )


def test_the_summary_of_a_run_without_work_is_short():
    found = report()
    found.message = "nothing to do"
    assert [line.split()[0] for line in shown(found).splitlines()] == ["result", "output", "shards"]


def test_the_summary_cuts_nothing_off_and_knows_no_markup():
    found = finished()
    found.output_url = "s3://[bold]/[/red]/" + "x" * 200
    assert found.output_url in shown(found).replace("\n", "").replace(" ", "")


def test_a_name_is_whole_on_a_narrow_terminal():
    """Run ids are names in what `status` shows."""
    console = Console(file=io.StringIO(), width=30, record=True)
    console.print(facts({"20260131T020304Z-0123abcd": "12 shards committed"}))
    assert "20260131T020304Z-0123abcd" in re.sub(r"\s.*\n|\n", "", drawn(console))


# --- report.json ---------------------------------------------------------------------------------------------------


def test_the_report_has_exactly_the_documented_keys():
    """Others read these files: a key is added here and on the page, never renamed."""
    section = PAGE.read_text().partition("## `report.json`")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE)
    found = json.loads(finished().to_json())
    assert [name for name, _ in documented] == list(found) == [field.name for field in fields(RunReport)]
    kinds = {"string": str, "integer": int, "number": float, "mapping": dict}
    for name, kind in documented:
        assert type(found[name]) is kinds.get(kind, list), name


def test_the_exit_code_is_a_number_and_other_names_than_utf8_stay_readable():
    found = finished()
    found.committed = ["file:///x/caf\udce9.tar", "file:///x/é.tar"]
    text = found.to_json()
    assert json.loads(text.encode())["committed"] == found.committed
    assert json.loads(text)["exit_code"] == 3
    assert "é" in text
