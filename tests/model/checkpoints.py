"""A small network and its checkpoint, for the tests of what weights are read from."""

from __future__ import annotations

import functools
import io

import torch
from torchvision.models import resnet18


@functools.cache
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return resnet18(num_classes=7)


def saved(checkpoint: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **options)
    return buffer.getvalue()
