"""What torchvision's ResNet family offers, known without importing torchvision (a test compares the two).

The driver refuses a misspelt network or weights at once with this table, and a preset is part of the model's
fingerprint, so it must not follow whichever torchvision happens to be installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import Transform
from pipeline.errors import ConfigError

NUM_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Architecture:
    """One torchvision network. `resize` gives the preset's short side in pixels for each of its weights."""

    weights_class: str
    resize: Mapping[str, int]
    embedding_dim: int

    def transform(self, weights: str = "IMAGENET1K_V1") -> Transform:
        """The preset of these weights; all of them crop 224 pixels and use ImageNet's mean and deviation."""
        return Transform(resize=self.resize[weights], crop=224)


_V1 = {"IMAGENET1K_V1": 256}
_V1_V2 = {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}

ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet18": Architecture("ResNet18_Weights", _V1, 512),
    "resnet34": Architecture("ResNet34_Weights", _V1, 512),
    "resnet50": Architecture("ResNet50_Weights", _V1_V2, 2048),
    "resnet101": Architecture("ResNet101_Weights", _V1_V2, 2048),
    "resnet152": Architecture("ResNet152_Weights", _V1_V2, 2048),
    "resnext50_32x4d": Architecture("ResNeXt50_32X4D_Weights", _V1_V2, 2048),
    "resnext101_32x8d": Architecture("ResNeXt101_32X8D_Weights", _V1_V2, 2048),
    "resnext101_64x4d": Architecture("ResNeXt101_64X4D_Weights", {"IMAGENET1K_V1": 232}, 2048),
    "wide_resnet50_2": Architecture("Wide_ResNet50_2_Weights", _V1_V2, 2048),
    "wide_resnet101_2": Architecture("Wide_ResNet101_2_Weights", _V1_V2, 2048),
}


def architecture(name: str) -> Architecture:
    """The torchvision network of that name; ConfigError with the list and the nearest one if there is none."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"model.name: {name!r} is no network of torchvision's ResNet family.{hint} Known: {', '.join(ARCHITECTURES)};"
        " or package.module:callable for your own."
    )


def full_weights_name(name: str, weights: str) -> str:
    """`ResNet50_Weights.IMAGENET1K_V2` for `IMAGENET1K_V2` or that very name; ConfigError if there are none such."""
    known = architecture(name)
    prefix, _, member = weights.rpartition(".")
    if member in known.resize and prefix in ("", known.weights_class):
        return f"{known.weights_class}.{member}"
    raise ConfigError(
        f"model.weights: {name} has no weights {weights!r}. Possible: {' or '.join(known.resize)} (torchvision's),"
        " a path or URL that ends in .pth, .pt, .th, .ckpt, .bin, .tar or .safetensors, or random."
    )
