"""A small network and its checkpoint, for the tests of what weights are read from."""

from __future__ import annotations

import functools
import io

import torch
from torchvision.models import resnet18

from pipeline.model.keys import match_keys
from pipeline.model.weights import fill, parse


@functools.cache
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return resnet18(num_classes=7)


def saved(checkpoint: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **options)
    return buffer.getvalue()


def assert_is_the_network(data: bytes, source: str = "net.pth") -> None:
    """The bytes fill a fresh network with exactly the parameters of `network()`."""
    other = resnet18(num_classes=7)
    fill(other, match_keys(parse(data, source), other.state_dict()), source)
    for name, value in network().state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in network().state_dict().items()}
