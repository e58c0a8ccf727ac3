from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from pathlib import Path

import pytest

from pipeline.config import Transform
from pipeline.errors import ConfigError
from pipeline.model.spec import ModelInfo, make_spec, noop_info
from tests.model.helpers import output_of, python


def test_the_driver_imports_neither_torch_nor_ray():
    code = """
import sys
import pipeline.model.engines, pipeline.model.spec, pipeline.model.zoo
print({"torch", "ray"} & set(sys.modules))
"""
    assert output_of(python(code)) == "set()"


def test_making_a_spec_of_a_custom_network_does_not_import_torch(tmp_path: Path):
    (tmp_path / "net.py").write_text("import torch\ndef build(): ...\n")
    (tmp_path / "net.pth").write_bytes(b"x")
    code = """
import pathlib, sys
from pipeline.config import make_config
from pipeline.model.spec import make_spec
model = {"name": "net:build", "weights": "net.pth"}
make_spec(make_config({"input": {"url": "in"}, "output": {"url": "out"}, "model": model}, pathlib.Path(sys.argv[1])))
print("torch" in sys.modules)
"""
    assert output_of(python(code, tmp_path)) == "False"


def test_a_spec_is_picklable(job, checkpoint: Path):
    spec = make_spec(job(name="resnet18", weights=str(checkpoint), classes=["a", "b"]))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.source is None


# The fingerprint: what it follows and what it does not.


def test_the_fingerprint_is_the_same_tomorrow(job):
    """Frozen, since datasets hold it: if this must change, raise RECIPE and say so in the changelog."""
    assert make_spec(job()).fingerprint == "aaf2ddb66b2b42fd"


CHANGES = [
    {"name": "resnet101"},
    {"weights": "IMAGENET1K_V1"},
    {"weights": "random"},
    {"weights": "random", "seed": 1},
    {"weights": "random", "num_classes": 10},
    {"weights": "random", "classes": ["a", "b"]},
    {"weights": "random", "classes": ["b", "a"]},
    {"transform": {"resize": 224}},
    {"transform": {"mean": None}},
    {"transform": {"interpolation": "bicubic"}},
    {"transform": {"decode": "reference"}},
    {"precision": "bfloat16"},
    {"engine": "noop"},
    {"output": {"top_k": 3}},
    {"output": {"embeddings": False}},
    {"output": {"predictions": False}},
    {"output": {"embedding_dtype": "float32"}},
]


def test_everything_that_changes_the_rows_changes_the_fingerprint_and_the_identity(job):
    specs = [make_spec(job(**change)) for change in [{}, *CHANGES]]
    assert len({spec.fingerprint for spec in specs}) == len(specs)
    assert len({str(spec.identity) for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    "same",
    [
        {"engine": "eager"},
        {"engine": "openvino"},
        {"weights": "ResNet50_Weights.IMAGENET1K_V2"},
        {"num_classes": 1000},
        {"seed": 5},
        {"transform": {"resize": 232}},  # the preset's own
        {"transform": {"interpolation": None}},
        {"output": {"url": "elsewhere"}},
    ],
)
def test_what_changes_no_row_changes_no_fingerprint(job, same):
    assert make_spec(job(**same)).fingerprint == make_spec(job()).fingerprint


def test_columns_that_are_not_written_do_not_count(job):
    labels = {"embeddings": False}
    assert make_spec(job(output=labels)) == make_spec(job(output=labels | {"embedding_dtype": "float32"}))


def test_a_file_counts_by_its_content_wherever_it_lies(job, tmp_path: Path, serve, monkeypatch):
    for name, content in {"a.pth": b"1", "b.pth": b"1", "c.pth": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    sha256 = hashlib.sha256(b"1").hexdigest()
    monkeypatch.chdir(tmp_path)
    places = ["a.pth", "b.pth", str(tmp_path / "a.pth"), f"file://{tmp_path}/a.pth", f"{serve(tmp_path).url}/a.pth"]
    specs = [make_spec(job(weights=place)) for place in places]
    assert {spec.fingerprint for spec in specs} == {specs[0].fingerprint}
    assert {spec.weights.sha256 for spec in specs} == {sha256}
    assert specs[0].weights.reference == str(tmp_path / "a.pth")
    assert make_spec(job(weights="c.pth")).fingerprint != specs[0].fingerprint
    trusted = make_spec(job(weights="https://example.invalid/a.pth", sha256=sha256.upper()))  # no request
    assert trusted.fingerprint == specs[0].fingerprint


def test_a_custom_network_counts_by_its_source(job, tmp_path: Path):
    def fingerprint(text: str) -> str:
        (tmp_path / "net.py").write_text(text)
        return make_spec(job(name="net:build", weights="random", directory=tmp_path)).fingerprint

    first = fingerprint("def build(): ...")
    assert fingerprint("def build(): pass") != first
    assert fingerprint("def build(): ...") == first


# The transform.


def test_the_preset_is_that_of_the_weights_with_the_config_on_top(job, checkpoint: Path):
    assert make_spec(job()).transform == Transform(resize=232, crop=224)
    assert make_spec(job(weights="IMAGENET1K_V1")).transform == Transform(resize=256, crop=224)
    assert make_spec(job(weights=str(checkpoint))).transform == Transform(resize=256, crop=224)
    assert make_spec(job(weights="random", name="resnext101_64x4d")).transform == Transform(resize=232, crop=224)
    override = {"resize": None, "crop": None}
    assert make_spec(job(transform=override)).transform == Transform(resize=None, crop=None)
    assert make_spec(job(transform={"mean": None})).transform == Transform(resize=232, crop=224, mean=None)


def test_a_custom_network_gets_imagenets(job, tmp_path: Path):
    (tmp_path / "net.py").write_text("def build(): ...")
    custom = {"name": "net:build", "weights": "random", "directory": tmp_path}
    assert make_spec(job(**custom)).transform == Transform(resize=256, crop=224)
    assert make_spec(job(**custom, transform={"crop": 32})).transform == Transform(resize=256, crop=32)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment")
@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o700, 0o644), (0o755, 0o600)])
def test_files_that_may_not_be_read_are_a_sentence(job, folder_mode: int, file_mode: int):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        private = Path(folder, "private")
        private.mkdir()
        for name in ("net.pth", "net.py"):
            (private / name).write_bytes(b"")
            (private / name).chmod(file_mode)
        private.chmod(folder_mode)
        Path(folder).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=r"model.weights: cannot .*Permission denied"):
                make_spec(job(weights=str(private / "net.pth")))
            with pytest.raises(ConfigError, match=r"model.name: "):
                make_spec(job(name="net:build", weights="random", directory=private))
        finally:
            os.seteuid(0)


def test_a_crop_that_is_larger_than_the_picture_must_be_asked_for(job):
    with pytest.raises(ConfigError, match=r"resize: 32 is less than the crop of the preset, 224.*to 32 or null"):
        make_spec(job(transform={"resize": 32}))
    with pytest.raises(ConfigError, match=r"crop: 384 is more than the resize of the preset, 232.*to 384 or more"):
        make_spec(job(transform={"crop": 384}))
    assert make_spec(job(transform={"crop": 384, "resize": 256})).transform.crop == 384
    assert make_spec(job(transform={"crop": 232})).transform.resize == 232
    for crop in (224, 32, None):
        assert make_spec(job(transform={"resize": 32, "crop": crop})).transform.crop == crop
    assert make_spec(job(transform={"resize": None})).transform.crop == 224


# What is refused, on the driver and before anything runs.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet51"}, "Did you mean resnet50"),
        ({"name": "resnet18"}, r"resnet18 has no weights 'IMAGENET1K_V2'. Possible: IMAGENET1K_V1 \(torchvision's\)"),
        ({"weights": "nowhere.pth"}, "model.weights: there is no file .*/nowhere.pth"),
        ({"weights": "file:///nowhere.pth"}, "model.weights: there is no file /nowhere.pth"),
        ({"weights": "net.onnx"}, r"\.pth, \.pt, \.th, \.ckpt, \.bin, \.tar or \.safetensors, or random"),
        ({"num_classes": 10}, "ResNet50_Weights.IMAGENET1K_V2 has 1000 classes, not 10"),
        ({"classes": ["a", "b"]}, "2 names for 1000 classes"),
        ({"weights": "random", "num_classes": 3, "classes": ["a", "b"]}, "2 names for 3 classes"),
        ({"name": "torchvision.models:resnet18"}, r"takes a path or URL that ends in .* or random"),
    ],
)
def test_models_that_cannot_be(job, model, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(job(**model))


def test_noop_needs_no_weights_and_knows_its_shape(job):
    spec = make_spec(job(name="resnet18", engine="noop"))  # with resnet50's default weights
    assert spec.is_noop
    assert noop_info(spec) == ModelInfo(1000, None, 512)
    assert noop_info(make_spec(job(engine="noop", classes=["a", "b"]))).num_classes == 2
    assert noop_info(make_spec(job(engine="noop"))).embedding_dim == 2048
