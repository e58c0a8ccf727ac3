"""The command line in this process or as from a shell, and a folder with shards, a config and a dataset to try it on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests.support.datasets import commit_all
from tests.support.jobs import digits_config, digits_tars

ROOT = Path(__file__).parents[2]


def labelled(folder: Path) -> Path:
    """The folder, with shards, a config (`job.yaml`), and the dataset of a run over them."""
    digits_tars(folder / "shards", 2, 10, broken=[7])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config)
    (folder / "job.yaml").write_text(json.dumps(config))
    return folder


def invoke(*words: str | Path) -> Result:
    """In this process. An exception that is no exit is an error of the test."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="resnet-batch")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """As from a shell."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **environment},
        timeout=120,
        check=False,
    )


def sentence(result: Result) -> str:
    """The one error that was printed: on stderr, as text, with nothing on stdout."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    return result.stderr.partition("error: ")[2].strip()
