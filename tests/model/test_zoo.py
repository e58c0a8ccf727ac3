"""Networks by name: built, wrapped, filled with weights, their classes counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model, get_weight

from pipeline.config import Transform
from pipeline.errors import ConfigError, WeightsError
from pipeline.model.catalog import ARCHITECTURES
from pipeline.model.spec import make_spec
from pipeline.model.zoo import build, get_resnet, resolve
from tests.model.helpers import computed, discriminating_state, normalised, output_of, photographs, python

# get_resnet: He et al. 2015, table 1.


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.69), (34, 21.80), (50, 25.56), (101, 44.55), (152, 60.19)])
def test_the_papers_depths(depth: int, millions: float):
    with torch.device("meta"):
        network = get_resnet(depth)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    convolutions = [
        m for name, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in name
    ]
    assert len(convolutions) + 1 == depth


def test_another_depth_is_a_value_error_with_those_there_are():
    with pytest.raises(ValueError, match=r"no ResNet of depth 20. Supported: 18, 34, 50, 101, 152"):
        get_resnet(20)


def test_get_resnet_takes_a_class_count_but_not_with_imagenets_weights():
    assert get_resnet(18, num_classes=7).fc.out_features == 7
    with pytest.raises(ValueError, match=r"the pretrained weights have 1000 classes, not 7"):
        get_resnet(18, pretrained=True, num_classes=7)


def test_pretrained_loads_torchvisions_weights(tmp_path: Path, monkeypatch, caplog):
    state = get_model("resnet18").state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = get_weight("ResNet18_Weights.IMAGENET1K_V1").url
    torch.save(state, tmp_path / "hub" / "checkpoints" / Path(url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torch.equal(get_resnet(18, pretrained=True).fc.weight, state["fc.weight"])
    assert "is not what torchvision publishes as ResNet18_Weights.IMAGENET1K_V1" in caplog.text


# torchvision's networks.


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"resnet152", "resnext101_64x4d", "wide_resnet101_2"}))
def test_every_architecture_gives_logits_and_embedding(job, name: str):
    spec = make_spec(job(name=name, weights="random", transform={"resize": 64, "crop": 64}))
    info = resolve(spec)
    logits, embeddings = computed(spec)
    assert (info.num_classes, info.embedding_dim) == (1000, ARCHITECTURES[name].embedding_dim)
    assert (logits.shape, embeddings.shape) == ((3, 1000), (3, info.embedding_dim))
    assert (logits.dtype, embeddings.dtype) == (np.float32, np.float32)


def test_the_numbers_are_those_of_plain_torchvision(job, checkpoint: Path):
    reference = get_model("resnet18", num_classes=40)
    reference.load_state_dict(discriminating_state())
    pooled: list[torch.Tensor] = []
    reference.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    with torch.inference_mode():
        expected = reference.eval()(normalised(photographs()[:8]))
    logits, embeddings = computed(make_spec(job(name="resnet18", weights=str(checkpoint))), photographs()[:8])
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3)
    np.testing.assert_allclose(embeddings, pooled[0].numpy(), atol=1e-5)


def test_a_seed_is_a_network_and_leaves_the_process_its_own(job):
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (computed(make_spec(job(name="resnet18", weights="random", seed=s)))[0] for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_class_count_comes_from_the_checkpoint(job, tmp_path: Path, suffix: str):
    state = {f"module.{key}": value for key, value in get_model("resnet18", num_classes=7).state_dict().items()}
    path = tmp_path / f"fine_tuned{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 1}, path)
    info = resolve(make_spec(job(name="resnet18", weights=str(path), classes=[f"class {i}" for i in range(7)])))
    assert (info.num_classes, info.classes[6]) == (7, "class 6")
    assert resolve(make_spec(job(name="resnet18", weights=str(path)))).classes is None
    with pytest.raises(ConfigError, match=r"2 names for 7 classes"):
        resolve(make_spec(job(name="resnet18", weights=str(path), classes=["a", "b"])))
    with pytest.raises(WeightsError, match=r"2 of another shape: fc.weight \(7, 512\) instead of \(9, 512\)"):
        resolve(make_spec(job(name="resnet18", weights=str(path), num_classes=9)))


def test_a_backbone_has_as_many_classes_as_it_is_said_to_have(job, tmp_path: Path):
    state = get_model("resnet18").state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "backbone.pth")
    options = {"name": "resnet18", "weights": str(tmp_path / "backbone.pth")}
    for given, found in ((None, 1000), (7, 7), (3, 3)):
        assert resolve(make_spec(job(**options, num_classes=given))).num_classes == found


def test_imagenets_names_come_with_torchvisions_weights_alone(job, tmp_path: Path, monkeypatch):
    weights = get_weight("ResNet18_Weights.IMAGENET1K_V1")
    path = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    path.parent.mkdir(parents=True)
    torch.save(get_model("resnet18").state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    info = resolve(make_spec(job(name="resnet18", weights="IMAGENET1K_V1")))
    assert info.classes == tuple(weights.meta["categories"])
    assert resolve(make_spec(job(name="resnet18", weights=str(path)))).classes is None


def test_a_network_of_another_name_does_not_fit(job, checkpoint: Path):
    with pytest.raises(WeightsError, match=r"do not fit the network; \d+ missing in the weights: layer1.0.conv3"):
        build(make_spec(job(name="resnet50", weights=str(checkpoint))))


# What a node remembers.


def test_a_resolved_model_is_remembered_and_costs_no_torch(job, checkpoint: Path, cache: Path):
    config = job(name="resnet18", weights=str(checkpoint), classes=[f"class {i}" for i in range(40)])
    spec = make_spec(config)
    info = resolve(spec)
    code = """
import json, sys
from pipeline.config import make_config
from pipeline.model.spec import make_spec
from pipeline.model.zoo import resolve
print(resolve(make_spec(make_config(json.loads(sys.argv[1])))), "torch" in sys.modules)
"""
    assert output_of(python(code, config.model_dump_json())) == f"{info} False"
    assert spec.transform == Transform(resize=256, crop=224)


def test_the_example_network_resolves_to_its_ten_digits(job):
    path = Path(__file__).parents[2] / "pipeline/examples/digits_resnet20.safetensors"
    transform = {"resize": 32, "crop": 32, "mean": None, "std": None}
    name = "pipeline.examples.network:digits_resnet20"
    spec = make_spec(job(name=name, weights=str(path), transform=transform))
    info = resolve(spec)
    assert (info.num_classes, info.embedding_dim, spec.input_size) == (10, 64, 32)
