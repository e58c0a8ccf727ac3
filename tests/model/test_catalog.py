from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.model.catalog import ARCHITECTURES, architecture, full_weights_name


def test_the_table_is_what_torchvision_has():
    """Names, weights, presets and widths: whoever raises torchvision's version sees here what changed."""
    from torchvision import models
    from torchvision.transforms import InterpolationMode

    family = [name for name in models.list_models(module=models) if "resnet" in name or "resnext" in name]
    assert sorted(ARCHITECTURES) == sorted(family)
    for name, known in ARCHITECTURES.items():
        offered = models.get_model_weights(name)
        assert offered.__name__ == known.weights_class
        assert {weights.name for weights in offered} == set(known.resize)
        for weights in offered:
            preset, ours = weights.transforms(), known.transform(weights.name)
            assert ([ours.resize], [ours.crop]) == (preset.resize_size, preset.crop_size)
            assert (ours.mean, ours.std) == (preset.mean, preset.std)
            assert preset.interpolation == InterpolationMode(ours.interpolation)
            assert len(weights.meta["categories"]) == 1000


def test_a_full_name_stands_for_itself():
    assert full_weights_name("resnet50", "IMAGENET1K_V2") == "ResNet50_Weights.IMAGENET1K_V2"
    assert full_weights_name("resnet50", "ResNet50_Weights.IMAGENET1K_V1") == "ResNet50_Weights.IMAGENET1K_V1"


def test_another_network_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'ResNet50'.*Did you mean resnet50\?.*resnext50_32x4d"):
        architecture("ResNet50")
    with pytest.raises(ConfigError, match=r"'vit_b_16' is no network of torchvision's ResNet family"):
        architecture("vit_b_16")


@pytest.mark.parametrize("weights", ["IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V1", "model.bin", "imagenet"])
def test_weights_that_a_network_does_not_have_are_refused_with_what_it_has(weights: str):
    with pytest.raises(ConfigError, match=r"IMAGENET1K_V1 \(torchvision's\).*\.safetensors, or random"):
        full_weights_name("resnet18", weights)
