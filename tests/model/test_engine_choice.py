"""Which engine a node computes with: the choice, what is converted once, and what a node can't offer."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.engines import choose_engine, find_engine, load_engine
from pipeline.model.spec import make_spec
from pipeline.model.zoo import resolve
from tests.model.helpers import (
    SIZE,
    make_job,
    output_of,
    photographs,
    python,
)

# OpenVINO: converted once per node, loaded without torch.

LOAD = """
import hashlib, json, sys
import numpy as np
from pipeline.config import make_config
from pipeline.model.engines import load_engine
from pipeline.model.spec import ModelInfo, make_spec
spec = make_spec(make_config(json.loads(sys.argv[1])))
engine = load_engine("openvino", spec, ModelInfo(40, None, 512), "cpu", 4)
logits, embeddings = engine(np.load(sys.argv[2]))
print(hashlib.sha256(logits.tobytes() + embeddings.tobytes()).hexdigest(), "torch" in sys.modules)
"""


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> tuple[str, Path]:
    """What LOAD takes: the config as JSON, and four photographs."""
    np.save(tmp_path / "pixels.npy", photographs()[:4])
    transform = {"resize": SIZE, "crop": SIZE}
    return make_job(
        name="resnet18", weights=str(checkpoint), transform=transform
    ).model_dump_json(), tmp_path / "pixels.npy"


def test_two_actors_convert_once_and_the_other_never_imports_torch(arguments, cache: Path):
    both = [output_of(process).split() for process in [python(LOAD, *arguments) for _ in range(2)]]
    assert sorted(torch_imported for _, torch_imported in both) == ["False", "True"]
    assert both[0][0] == both[1][0]
    assert len(list((cache / "openvino").iterdir())) == 1
    assert (next((cache / "openvino").iterdir()) / "network.bin").stat().st_size > 40e6  # fp32, not rounded to fp16


def test_a_conversion_that_was_killed_is_not_used(arguments, cache: Path):
    process = python(LOAD, *arguments)
    deadline = time.monotonic() + 60
    while not list(cache.glob("openvino/.tmp-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in (cache / "openvino").iterdir() if not path.name.startswith(".tmp-")] == []
    assert output_of(python(LOAD, *arguments)).endswith("True")


def test_a_damaged_network_is_converted_again_and_a_cache_that_is_filled_only_read(arguments, cache: Path):
    numbers = output_of(python(LOAD, *arguments)).split()[0]
    (folder,) = (cache / "openvino").iterdir()
    with (folder / "network.bin").open("r+b") as file:
        file.truncate(20_000_000)
    said = python(LOAD, *arguments).communicate(timeout=120)
    assert said[0].split() == [numbers, "True"], said
    assert f"the converted network in {folder} cannot be read: converting it again" in said[1]
    shutil.rmtree(cache / "locks")
    (cache / "locks").write_text("")  # so that nobody can take a lock
    assert output_of(python(LOAD, *arguments)).split() == [numbers, "False"]


def test_a_full_disk_leaves_no_network(arguments, cache: Path):
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, -1))
"""
    said = python(limit + LOAD, *arguments).communicate(timeout=120)
    assert "FatalError: cannot write the converted network to" in said[1]
    assert "Is the disk full?" in said[1]
    assert list((cache / "openvino").iterdir()) == []


CUSTOM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)
    def forward(self, x):
        pooled = x.mean((2, 3))
        {}
        return self.fc(pooled)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pooled = pooled * 2 if x.sum() > 0 else pooled", "OpenVINO does not compute what torch does with .* net:Net"),
        ("pooled = torch.special.bessel_j0(pooled)", "OpenVINO can't convert the network net:Net: .*bessel_j0"),
    ],
)
def test_networks_that_do_not_survive_conversion_are_computed_by_torch(
    tmp_path: Path, line: str, message: str, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "net.py").write_text(CUSTOM.format(line))
    transform = {"resize": None, "crop": 32}
    spec = make_spec(make_job(name="net:Net", weights="random", transform=transform, directory=tmp_path))
    info = resolve(spec)
    with pytest.raises(ConfigError, match=message):
        load_engine("openvino", spec, info, "cpu", 4)
    assert find_engine("openvino", "cpu", spec) == "openvino"
    assert find_engine("auto", "cpu", spec) == "eager"
    assert re.search(f"auto is eager here. {message}", caplog.text)
    assert load_engine("eager", spec, info, "cpu", 4)(photographs()[:4, :32, :32])[0].shape == (4, 5)


def test_a_custom_network_that_takes_one_size_is_converted(tmp_path: Path):
    text = (
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(32), nn.Flatten(), nn.Linear(4, 5))\n"
    )
    (tmp_path / "net.py").write_text(text)
    transform = {"resize": None, "crop": None}
    spec = make_spec(make_job(name="net:build", weights="random", transform=transform, directory=tmp_path))
    engines = [load_engine(name, spec, resolve(spec), "cpu", 4) for name in ("eager", "openvino")]
    results = [engine(np.ascontiguousarray(photographs()[:4, :32, :32])) for engine in engines]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)


# What a node offers.


def test_noop_returns_zeros_and_imports_no_torch():
    code = """
import json, sys
import numpy as np
from pipeline.config import make_config
from pipeline.model.engines import load_engine
from pipeline.model.spec import make_spec
from pipeline.model.zoo import resolve
spec = make_spec(make_config(json.loads(sys.argv[1])))
logits, embeddings = load_engine("noop", spec, resolve(spec), "cpu", 3)(np.ones((3, 8, 8, 3), np.uint8))
print(logits.shape, embeddings.shape, logits.dtype, logits.any() or embeddings.any(), "torch" in sys.modules)
"""
    config = json.dumps(make_job(engine="noop").model_dump())
    assert output_of(python(code, config)) == "(3, 1000) (3, 2048) float32 False False"


def test_a_noop_spec_never_reaches_a_real_engine():
    spec = make_spec(make_job(engine="noop"))
    with pytest.raises(ConfigError, match=r"specified for the engine noop"):
        load_engine("eager", spec, resolve(spec), "cpu", 4)


@pytest.mark.parametrize(
    ("requested", "device", "precision", "chosen"),
    [
        ("auto", "cpu", "float32", "openvino"),
        ("auto", "cpu", "bfloat16", "openvino"),
        ("auto", "cpu", "float16", "eager"),
        ("auto", "cpu", "int8", "openvino"),
        ("noop", "cuda", "int8", "noop"),
        ("auto", "cuda", "float32", "eager"),
        ("compile", "cuda", "float16", "compile"),
        ("noop", "cuda", "float32", "noop"),
    ],
)
def test_the_engine_that_is_chosen(requested, device, precision, chosen):
    assert choose_engine(requested, device, precision) == chosen


@pytest.mark.parametrize(
    ("requested", "device", "precision", "message"),
    [
        ("auto", "cuda", "int8", "int8 is computed by openvino on CPUs; here runtime.engine is auto on cuda"),
        ("eager", "cpu", "int8", "here runtime.engine is eager on cpu. Use runtime.device=cpu, runtime.engine=auto"),
        ("compile", "cpu", "int8", "pip install openvino nncf"),
        ("openvino", "cuda", "float32", "openvino runs on CPUs here"),
        ("openvino", "cpu", "float16", "float32, bfloat16 or int8"),
    ],
)
def test_engines_that_cannot_be(requested, device, precision, message):
    with pytest.raises(ConfigError, match=message):
        choose_engine(requested, device, precision)


def test_without_openvino_auto_is_eager(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert choose_engine("auto", "cpu", "float32") == "eager"
    with pytest.raises(ConfigError, match="int8 is computed by openvino .* and openvino is not installed"):
        choose_engine("auto", "cpu", "int8")


def test_without_openvino_asking_for_it_is_an_error(arguments):
    hide = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "openvino":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""
    process = python(hide + LOAD, *arguments)
    assert (
        "ConfigError: runtime.engine: openvino is not installed on this node: pip install" in process.communicate()[1]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error():
    spec = make_spec(make_job(name="resnet18", weights="random"))
    with pytest.raises(ConfigError, match=r"there is no CUDA device here"):
        load_engine("eager", spec, resolve(spec), "cuda", 4)


def test_a_node_without_compiler_says_so(arguments):
    code = LOAD.replace('"openvino"', '"compile"')
    process = python(code, *arguments, CXX="/nonexistent/c++", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ConfigError: runtime.engine: compile does not work here with resnet18" in stderr
    assert "Use runtime.engine=eager" in stderr
