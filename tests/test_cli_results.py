"""What the commands print of a dataset, for people and as JSON."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from pipeline import tables
from pipeline.config import load_config
from pipeline.error_rows import DeadLetters, ShardErrors
from pipeline.errors import ExitCode
from pipeline.examples.digits import load_digits_images
from pipeline.inputs.shards import shard_id
from pipeline.pruning import Gone, Pruned
from pipeline.report import RunReport
from tests.support.cli import command, invoke, labelled, sentence
from tests.support.jobs import digits_tars


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("cli"))


def test_plan_says_what_would_run(folder: Path, tmp_path: Path):
    digits_tars(tmp_path / "shards", 3, 4)
    url = f"input.url=[{folder}/shards/digits-000.tar, {tmp_path}/shards/digits-002.tar]"
    result = invoke("plan", folder / "job.yaml", url)
    assert result.exit_code == 0
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "to do 1 shard, 0.0 MB (0 changed)",
        "done 1 shard",
        "gone 1 shard of the output no longer in the input",
        shard_id(f"file://{folder}/shards/digits-001.tar"),
    ]
    found = json.loads(invoke("plan", folder / "job.yaml", url, "--json").stdout)
    assert found["todo"] == [f"file://{tmp_path}/shards/digits-002.tar"]
    assert (found["done"], len(found["gone"]), found["changed"], found["retried"]) == (1, 1, [], [])
    assert found["bytes"] == (tmp_path / "shards/digits-002.tar").stat().st_size


def test_status_and_verify(folder: Path):
    result = invoke("status", folder / "labels")
    assert result.exit_code == 0
    assert "2 complete, 0 to be done again" in result.stdout
    assert "18 predicted, 2 errors" in result.stdout
    assert "2 shards committed" in result.stdout
    found = json.loads(invoke("status", folder / "labels", "--json").stdout)
    assert (found["shards"], found["predicted"], found["errors"]) == (2, 18, 2)
    result = invoke("verify", folder / "labels", "--sample", "3", "--config", folder / "job.yaml")
    assert result.exit_code == 0
    assert result.stdout.strip() == "2 shards, 18 rows, 2 error rows; 3 of 3 recomputed rows agree: all is well"
    found = json.loads(invoke("verify", folder / "labels", "--json").stdout)
    assert (found["shards"], found["problems"], found["ok"]) == (2, [], True)


def lines(result: Result) -> list[str]:
    """What was printed, with blanks as one."""
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_plan_with_error_rows_to_be_tried_again(folder: Path):
    for option in (["--retry-errors", "truncated,corrupt"], ["--retry-errors", "empty", "--retry-errors", "all"]):
        result = invoke("plan", folder / "job.yaml", *option)
        assert lines(result)[0] == "to do 2 shards, 0.1 MB (0 changed, 2 for their error rows)"
    found = json.loads(invoke("plan", folder / "job.yaml", "--retry-errors", "all", "--json").stdout)
    assert found["retried"] == found["todo"] != []
    assert json.loads(invoke("plan", folder / "job.yaml", "--retry-errors", "empty", "--json").stdout)["todo"] == []
    for verb in ("run", "plan"):
        result = invoke(verb, folder / "job.yaml", "--retry-errors", "trunkated")
        assert result.exit_code == 2
        assert sentence(result) == "there is no error class 'trunkated'; did you mean truncated?"


def test_errors(folder: Path, tmp_path: Path):
    (name,) = {row["error"] for row in json.loads(invoke("errors", folder / "labels", "--json").stdout)["classes"]}
    result = invoke("errors", folder / "labels", "--export", tmp_path / "bad", "--limit", "1")
    assert result.exit_code == 0
    urls = [f"file://{folder}/shards/digits-00{number}.tar" for number in range(2)]
    assert lines(result) == [
        "rows stage error",
        f"2 decode {name}",
        "",
        "rows shard classes",
        *(f"1 {url} {name} 1" for url in urls),
        f"1 file written to {tmp_path}/bad",
        "1 row left out by --limit",
    ]
    assert len([path for path in (tmp_path / "bad").rglob("*") if path.is_file()]) == 1
    assert lines(invoke("errors", folder / "labels", "--class", "empty")) == ["no error rows"]
    result = invoke("errors", folder / "labels", "--class", "emtpy")
    assert (result.exit_code, sentence(result)) == (2, "there is no error class 'emtpy'; did you mean empty?")


def test_errors_shows_the_worst_shards_and_json_all(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shards = [ShardErrors(f"id-{n}", f"[bold]/{n}.tar", 9, {"empty": 9}, 0) for n in range(23)]
    counts = [{"stage": "decode", "error": "empty", "rows": 23 * 9}]
    monkeypatch.setattr("pipeline.api.dead_letters", lambda *_: DeadLetters("labels", 23 * 9, counts, shards))
    shown = lines(invoke("errors", "labels"))
    assert [line for line in shown if ".tar" in line] == [f"9 [bold]/{n}.tar empty 9" for n in range(20)]
    assert shown[-1] == "and 3 more shards"
    assert len(json.loads(invoke("errors", "labels", "--json").stdout)["shards"]) == 23


def test_prune(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "labels", tmp_path / "labels", copy_function=shutil.copy2)
    url, labels = f"file://{folder}/shards/digits-001.tar", f"output.url={tmp_path}/labels"
    words = ("prune", folder / "job.yaml", f"input.url={folder}/shards/digits-000.tar", labels)
    result = invoke(*words)
    assert result.exit_code == 0
    assert lines(result) == [
        "id shard rows errors",
        f"{shard_id(url)} {url} 9 1 to be removed",
        "nothing was removed; --yes removes 1 shard",
    ]
    (gone,) = json.loads(invoke(*words, "--yes", "--json").stdout)["gone"]
    assert (gone["id"], gone["removed"]) == (shard_id(url), True)
    assert lines(invoke(*words)) == ["nothing to prune: every shard of the dataset is in the input"]
    assert lines(invoke("verify", tmp_path / "labels"))[0].startswith("1 shard, 9 rows, 1 error row: all is well")
    result = invoke("prune", folder / "job.yaml", f"input.url={tmp_path}/nothing", labels, "--yes")
    assert result.exit_code == 2
    assert "there is nothing to read" in sentence(result)


def test_limit_prints_samples_and_writes_nothing_at_all(folder: Path, tmp_path: Path):
    words = ("run", folder / "job.yaml", f"output.url={tmp_path}/labels", "--limit", "9")
    result = invoke(*words)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["key", "label", "score", "width", "height", "error"]
    assert [line[0] for line in lines[1:]] == load_digits_images().keys[:9]
    assert sum(line[1] in {"corrupt", "truncated", "not_an_image"} for line in lines) == 1
    assert list(tmp_path.iterdir()) == []
    found = json.loads(invoke(*words, "--json").stdout)
    assert len(found) == 9
    assert {"key", "label", "score", "top_k", "embedding", "error"} <= set(found[0])


def test_stdout_is_the_result_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray prints on the driver's stdout what its workers print."""

    def chatter(*_: Any) -> RunReport:
        print("from a worker")
        return RunReport("id", "labels", message="fine")

    monkeypatch.setattr("pipeline.api.run", chatter)
    result = invoke("run", folder / "job.yaml", "--json")
    assert json.loads(result.stdout)["message"] == "fine"
    assert "from a worker" in result.stderr


def test_long_values_are_whole_where_stdout_is_no_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch):
    url = "s3://bucket/" + "x" * 300
    monkeypatch.setattr("pipeline.api.run", lambda *_: RunReport("id", url, exit_code=ExitCode.INCOMPLETE))
    result = invoke("run", folder / "job.yaml")
    assert url in result.stdout
    assert result.exit_code == 3


def test_what_would_be_pruned_is_whole_on_a_narrow_terminal():
    url = f"s3://bucket/{'x' * 60}.tar"
    console = Console(file=io.StringIO(), width=50, record=True)
    console.print(tables.pruned_shown(Pruned("labels", [Gone(shard_id(url), url, 10, 0)])))
    text = console.export_text()
    assert (text.count("x"), "…" in text) == (2 * 60, False)


def test_a_name_that_is_not_utf8_is_shown_as_it_can_be(folder: Path, tmp_path: Path):
    path = tmp_path / "caf\udce9"
    done = command("plan", folder / "job.yaml", f"input.url={path}")
    assert done.returncode == 2
    assert f"there is nothing to read under {tmp_path}/caf\\udce9" in done.stderr
    done = command("run", folder / "job.yaml", f"input.url={path}", "input.allow_empty=true", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["input"]["url"] == str(path)


def test_json_of_what_mostly_talks(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path):
    """The demo's and the job's own words go to stderr then."""
    monkeypatch.setattr("pipeline.api.demo", lambda *_: print("the picture") or RunReport("id", "labels"))
    result = invoke("demo", tmp_path, "--json")
    assert json.loads(result.stdout)["run_id"] == "id"
    assert "the picture" in result.stderr
    monkeypatch.setattr("pipeline.api.submit", lambda *a: print("the log") or (3 if a[2] else "night"))
    result = invoke("submit", folder / "job.yaml", "--json")
    assert (json.loads(result.stdout), result.exit_code) == ({"exit_code": 3}, 3)
    assert "the log" in result.stderr
    result = invoke("submit", folder / "job.yaml", "--no-wait", "--json")
    assert (json.loads(result.stdout), result.exit_code) == ({"submission_id": "night"}, 0)
    result = invoke("submit", folder / "job.yaml", "--no-wait")
    assert result.stdout == "the log\nnight\n"
    result = invoke("init", tmp_path / "job.yaml", "--json")
    assert json.loads(result.stdout) == {"path": str(tmp_path / "job.yaml")}


def test_init(tmp_path: Path):
    path = tmp_path / "night.yaml"
    result = invoke("init", path)
    assert result.exit_code == 0
    assert f"resnet-batch plan {path}" in result.stdout
    assert load_config(path).model.name == "resnet50"
    path.write_text("mine")
    result = invoke("init", path)
    assert result.exit_code == 2
    assert "exists already" in sentence(result)
    assert path.read_text() == "mine"
