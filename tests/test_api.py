"""The library's surface: its names, what importing them costs, and what they answer."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.main import get_command

import pipeline
from pipeline import api, cli
from pipeline.config import load_config
from pipeline.errors import ConfigError, NotFound
from tests.support.datasets import commit_all
from tests.support.jobs import digits_config, digits_tars

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "torchvision", "ray", "pydantic", "numpy", "pyarrow", "fsspec", "omegaconf", "typer", "PIL"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("api")
    digits_tars(folder / "shards", 2, 10, broken=[7])
    config = digits_config(folder / "shards", folder / "labels")
    commit_all(config)
    return config


# --- Names ---------------------------------------------------------------------------------------------------------


def test_the_public_names_are_these():
    """Others import them: a name is added here, never renamed."""
    assert pipeline.__all__ == [
        *("JobConfig", "dead_letters", "demo", "get_resnet", "init", "load_config", "plan", "predict", "preview"),
        *("prune", "read", "run", "status", "submit", "verify"),
    ]
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)


def test_no_module_has_a_public_name():
    """Importing `pipeline.x` sets the attribute `x` of the package: it would take the place of the function."""
    modules = {path.stem for path in Path(pipeline.__file__).parent.iterdir()}
    assert not modules & set(pipeline.__all__)


def test_every_command_is_a_function():
    """Of the same name, but for `errors`, since `pipeline.errors` is the module of the exceptions."""
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    functions = {"dead_letters" if name == "errors" else name for name in commands}
    assert functions <= set(pipeline.__all__)
    for name in functions:
        assert getattr(pipeline, name) is getattr(api, name)
        assert getattr(api, name).__doc__


def test_signatures():
    """Keyword arguments are part of the surface."""
    found = {
        name: list(inspect.signature(getattr(api, name)).parameters) for name in pipeline.__all__ if hasattr(api, name)
    }
    assert found == {
        "dead_letters": ["url", "classes", "export", "limit", "config"],
        "demo": ["folder", "pretrained"],
        "init": ["path"],
        "load_config": ["path", "overrides"],
        "JobConfig": found["JobConfig"],
        "plan": ["config", "retry_errors", "estimate", "price_per_hour"],
        "predict": ["images", "config"],
        "preview": ["config", "limit"],
        "prune": ["config", "yes"],
        "read": ["url", "columns", "errors", "config"],
        "run": ["config", "retry_errors"],
        "status": ["url", "config"],
        "submit": ["config", "address", "wait", "submission_id", "retry_errors"],
        "verify": ["url", "sample", "config"],
    }


def test_the_version_is_the_projects():
    assert pipeline.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        pipeline.runn  # noqa: B018


def imported_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stderr.split())


def test_importing_the_package_costs_nothing():
    assert imported_after("import pipeline") == set()


def test_the_exceptions_are_there_at_once():
    assert imported_after("import pipeline; pipeline.errors.PipelineError") == set()


def test_planning_reading_and_status_need_neither_torch_nor_ray(job: dict[str, Any]):
    code = f"import pipeline, json; job = json.loads({json.dumps(json.dumps(job))})\n"
    code += "pipeline.plan(job); pipeline.status(job['output']['url']); pipeline.verify(job['output']['url'])\n"
    code += "pipeline.read(job['output']['url']); pipeline.load_config('configs/local.yaml')\n"
    code += "pipeline.prune(job); pipeline.dead_letters(job['output']['url'])"
    assert not imported_after(code) & {"torch", "torchvision", "ray"}


# --- Answers -------------------------------------------------------------------------------------------------------


def test_read_gives_rows_error_rows_and_columns(job: dict[str, Any]):
    url = job["output"]["url"]
    rows = pipeline.read(url)
    assert isinstance(rows, pa.Table)
    assert rows.num_rows == 18
    assert pipeline.read(url, ["key", "label"]).column_names == ["key", "label"]
    errors = pipeline.read(url, errors=True)
    assert errors["index"].to_pylist() == [7, 7]
    assert pipeline.read(url, ["key", "error"], errors=True).column_names == ["key", "error"]
    frame = rows.to_pandas()
    assert list(frame.columns) == rows.column_names
    assert frame["label"].isin([str(digit) for digit in range(10)]).all()


def test_a_dataset_is_a_url_or_a_path(job: dict[str, Any]):
    path = Path(job["output"]["url"])
    assert pipeline.read(path).num_rows == pipeline.status(path).predicted == 18
    assert pipeline.verify(path).ok
    assert pipeline.dead_letters(path).rows == 2


@pytest.mark.parametrize("errors", [False, True])
def test_a_column_that_is_not_there_is_named_beside_those_that_are(errors: bool, job: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"labels has no column nocol; there are key, shard, index, .*\w\.$"):
        pipeline.read(job["output"]["url"], ["key", "nocol"], errors=errors)


def test_numbers_of_rows_that_cannot_be_are_refused(job: dict[str, Any]):
    with pytest.raises(ConfigError, match="sample is a number of rows, 0 for none; got -1"):
        pipeline.verify(job["output"]["url"], -1)
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"a preview shows at least 1 sample; got {limit}"):
            pipeline.preview(job, limit)


def test_reading_what_is_not_there(tmp_path: Path):
    with pytest.raises(NotFound, match="there is no dataset at"):
        pipeline.read(str(tmp_path))


def test_a_config_is_an_object_a_mapping_or_a_path(job: dict[str, Any], tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job))
    for config in (job, path, str(path), load_config(path)):
        found = pipeline.plan(config)
        assert (len(found.tasks), len(found.done)) == (0, 2)
    with pytest.raises(ConfigError, match=r"modle: unknown key; did you mean model\?"):
        pipeline.plan(job | {"modle": {}})


def test_the_methods_can_be_called_twice(job: dict[str, Any]):
    for _ in range(2):
        assert pipeline.status(job["output"]["url"]).predicted == 18
        assert pipeline.verify(job["output"]["url"]).ok


def test_init_writes_a_config_and_never_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = pipeline.init()
    assert path == Path("config.yaml")
    assert load_config(path).input.url == "images/"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=re.escape("config.yaml exists already. Choose another name.")):
        pipeline.init()
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match=re.escape("cannot write nowhere/job.yaml: No such file or directory.")):
        pipeline.init("nowhere/job.yaml")


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_demo_needs_a_folder_to_write_into(pretrained: bool, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot write into .*: Not a directory\. Choose another folder\."):
        pipeline.demo(tmp_path / "file", pretrained)


def test_init_is_the_same_in_an_old_locale(tmp_path: Path):
    program = f"import pipeline; pipeline.init({str(tmp_path / 'config.yaml')!r})"
    old = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], env=old, check=True, timeout=60)
    template = Path(pipeline.__file__).with_name("template.yaml")
    assert (tmp_path / "config.yaml").read_bytes() == template.read_bytes()
