"""The command line as people and scripts meet it: what it prints where, and what it exits with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pipeline
from pipeline.cli import app
from pipeline.config import load_config
from pipeline.errors import ExitCode
from pipeline.report import RunReport
from scripts.cli_docs import PAGE, updated
from tests.support.cli import ROOT, command, invoke, labelled, sentence
from tests.support.s3 import s3_server
from tests.support.web import serving

COMMANDS = ["run", "plan", "status", "errors", "prune", "verify", "submit", "demo", "init"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("cli"))


# --- As from a shell -------------------------------------------------------------------------------------------------


def test_0_is_complete(folder: Path):
    done = command("run", folder / "job.yaml", "--json")
    assert done.returncode == ExitCode.COMPLETE, done.stderr
    report = json.loads(done.stdout)
    assert (report["shards_done_before"], report["shards_committed"], report["exit_code"]) == (2, 0, 0)
    assert set(report) == set(vars(RunReport("", "")))


def test_1_is_failed(folder: Path):
    done = command("plan", folder / "job.yaml", "output.top_k=2")
    assert done.returncode == ExitCode.FAILED
    assert "output.url" in done.stderr
    assert "top_k: the dataset has 5, this run 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_2_is_a_wrong_config():
    done = command("run", "configs/local.yaml", "model.nme=resnet18")
    assert done.returncode == ExitCode.USAGE
    assert (done.stdout, done.stderr) == (
        "",
        'error: model.nme: unknown key; did you mean model.name? (got "resnet18")\n',
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "which job? Give input.url=photos/ and output.url=labels, or a config file"),
        (("input.url=photos",), "output.url: missing, and there is no default"),
        (("input.url=.", "output.url=gs://bucket/x"), "output.url: gs://bucket/x cannot be written to"),
        (("input.url=.", "output.url=https://host/x"), "an output is a local folder or s3://bucket/prefix"),
    ],
)
def test_a_job_that_is_not_whole(words: tuple[str, ...], says: str):
    for verb in ("run", "plan", "prune"):
        result = invoke(verb, *words)
        assert result.exit_code == ExitCode.USAGE
        assert says in sentence(result)


def test_s3_has_other_names_too():
    result = invoke("plan", "input.url=.", "output.url=s3a://bucket/x", "storage.deadline_s=0.1")
    assert "cannot be written to" not in sentence(result)


def test_3_is_a_store_that_is_down():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        words = ("plan", "input.url=s3://raw/*.tar", "output.url=s3://labels", "model.weights=random")
        storage = (f"storage.endpoint_url={url}", "storage.deadline_s=1")
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
        done = command(*words, *storage, **keys)
    assert done.returncode == ExitCode.INCOMPLETE, done.stderr
    assert done.stderr.startswith("error: cannot read s3://labels/_dataset.json: ")
    assert done.stderr.endswith("Run again when the store answers; what is committed stays.\n")
    assert "Traceback" not in done.stderr


def test_usage_errors_are_2():
    for words in (["run", "--nope"], ["no-such-command"], ["status"], ["run", "--limit", "0"]):
        result = invoke(*words)
        assert result.exit_code == ExitCode.USAGE
        assert result.stdout == ""
        assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "--price", "5"], "a price without an estimate says nothing"),
        (["plan", "--estimate", "--price", "inf"], "a price is a number that is not negative; got inf"),
        (["run", "--limit", "5", "--retry-errors", "all"], "nothing to --retry-errors"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str], says: str, folder: Path):
    result = invoke(words[0], folder / "job.yaml", *words[1:])
    assert result.exit_code == ExitCode.USAGE
    assert says in sentence(result)


def test_the_program_is_light_and_answers_at_once(folder: Path):
    """`plan` and `status` load neither torch nor Ray, and work with nothing that is only there for a run."""
    script = (
        "import sys, pipeline.cli\n"
        "try: pipeline.cli.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(*sorted({'ray', 'torch', 'torchvision', 's3fs', 'sklearn'} & set(sys.modules)), file=sys.stderr)\n"
    )
    for words in (["plan", str(folder / "job.yaml")], ["status", str(folder / "labels")], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
        )
        assert done.stderr.strip() == "", words
        assert done.stdout


# --- What went wrong, in a sentence --------------------------------------------------------------------------------


def test_a_misspelt_key_and_a_wrong_type_at_once(folder: Path):
    result = invoke("plan", folder / "job.yaml", "runtime.batchsize=3", "output.top_k=five")
    assert result.exit_code == 2
    assert sorted(sentence(result).splitlines()) == [
        'output.top_k: must be a whole number (got "five")',
        "runtime.batchsize: unknown key; did you mean runtime.batch_size? (got 3)",
    ]


def test_no_such_config(tmp_path: Path):
    result = invoke("run", tmp_path / "nope.yaml")
    assert result.exit_code == 2
    assert sentence(result).endswith("`resnet-batch init` writes one to start from.")


@pytest.mark.parametrize("make", [False, True], ids=["no such folder", "empty folder"])
def test_nothing_to_read(make: bool, folder: Path, tmp_path: Path):
    images = tmp_path / "images"
    if make:
        images.mkdir()
    result = invoke("plan", folder / "job.yaml", f"input.url={images}")
    assert result.exit_code == 2
    assert sentence(result).startswith(f"input.url: there is nothing to read under {images}")
    assert "input.allow_empty=true" in sentence(result)


def test_an_error_is_no_markup(folder: Path):
    result = invoke("plan", folder / "job.yaml", "input.url=/nowhere/[bold]/[/red]")
    assert "/nowhere/[bold]/[/red]" in sentence(result)


def test_another_models_dataset(folder: Path):
    result = invoke("run", folder / "job.yaml", "model.transform.resize=48")
    assert result.exit_code == 1
    assert "vectors of two models must not mix" in sentence(result)
    assert "model.transform.resize: the dataset has 32, this run 48" in sentence(result)


def test_a_network_and_weights_that_do_not_exist(folder: Path):
    result = invoke("plan", folder / "job.yaml", "model.name=resnet19", "model.weights=random")
    assert result.exit_code == 2
    assert "model.name: 'resnet19' is no network" in sentence(result)
    result = invoke("plan", folder / "job.yaml", "model.weights=nowhere/w.safetensors")
    assert result.exit_code == 2
    assert "model.weights: there is no file" in sentence(result)


class _Missing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Missing)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_weights_that_cannot_be_fetched(folder: Path, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RESNET_BATCH_CACHE", str(tmp_path))
    url = web.replace("//", "//user:hunter2@") + "/w.safetensors?Signature=hunter2"
    result = invoke("plan", folder / "job.yaml", f"model.weights={url}")
    assert result.exit_code == 1
    assert sentence(result).startswith("cannot fetch the weights: ")
    assert f"{web}/w.safetensors" in sentence(result)
    assert "give the file's path as model.weights" in sentence(result)
    assert "hunter2" not in result.stderr


def test_no_credentials(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    result = invoke("plan", folder / "job.yaml", "input.url=s3://raw/*.tar", "storage.endpoint_url=http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "Unable to locate credentials" in sentence(result)
    assert "AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role" in sentence(result)


def test_a_bucket_that_is_not_there_and_keys_that_are_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with s3_server() as server:
        endpoint = f"storage.endpoint_url={server.endpoint_url}"
        server.become(monkeypatch, server.owner)
        result = invoke("plan", folder / "job.yaml", "input.url=s3://nowhere/*.tar", endpoint)
        assert result.exit_code == 2
        assert sentence(result).startswith("cannot list s3://nowhere: ")
        assert "bucket does not exist. Check the URL and the storage section" in sentence(result)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        # With another option, since this process is connected already.
        result = invoke("plan", folder / "job.yaml", "input.url=s3://raw/*.tar", endpoint, "storage.deadline_s=60")
        assert result.exit_code == 1
        assert sentence(result).startswith("cannot list s3://raw: ")
        assert "Check the credentials in this environment" in sentence(result)


def test_no_dataset(tmp_path: Path):
    for name in ("status", "verify", "errors"):
        result = invoke(name, tmp_path)
        assert result.exit_code == 1
        assert "there is no dataset at" in sentence(result)


def test_a_traceback_only_on_request(folder: Path):
    result = invoke("plan", folder / "job.yaml", "output.top_k=0", "--debug")
    assert result.exit_code == 2, "the same as without it"
    assert "Traceback" in result.stderr
    assert "error: output.top_k: must be at least 1 (got 0)" in result.stderr


# --- Help ----------------------------------------------------------------------------------------------------------


def test_every_command_has_a_sentence_and_examples():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == COMMANDS
    overview = invoke("--help").stdout
    for name in COMMANDS:
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert f"resnet-batch {name}" in result.stdout.partition("Examples:")[2]
        assert name in overview
    assert "Exit codes: 0 complete · 1 failed · 2 bad usage or config · 3 incomplete" in " ".join(overview.split())


def test_the_examples_would_be_understood():
    """Every example in the help has options and keys that exist."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, found in commands.items():
        options = {option for parameter in found.params for option in [*parameter.opts, *parameter.secondary_opts]}
        for example in found.epilog.split("`")[1::2]:
            words = example.split()
            assert words[:2] == ["resnet-batch", name]
            assert {word for word in words if word.startswith("--")} <= options
            overrides = [word for word in words if "=" in word]
            if overrides:
                load_config(None, ["input.url=a", "output.url=b", *overrides])


def test_the_page_has_every_command_and_option():
    page = PAGE.read_text()
    assert page == updated(page), "write it anew: python scripts/cli_docs.py"


def test_version_and_completion():
    assert invoke("--version").stdout == f"resnet-batch {pipeline.__version__}\n"
    # Below a shell that waits for it, whatever runs the tests: the completion is that of the shell above.
    program = f"{sys.executable} -m pipeline --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
    assert "complete" in done.stdout
    result = invoke()
    assert "Usage: resnet-batch" in result.stdout + result.stderr
