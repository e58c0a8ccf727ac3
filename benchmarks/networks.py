"""Weights that tell photographs apart, and the networks that the arms of `compare` predict with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD, Transform, make_config
from pipeline.model.openvino_engine import OpenVinoEngine, check_installed, compiled, converted
from pipeline.model.spec import ModelSpec, make_spec

NUM_CLASSES = 40
CORES = len(os.sched_getaffinity(0))

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 (B, 224, 224, 3) to class ids int64 (B,)


def write_weights(name: str, encoded: list[bytes], path: Path) -> None:
    """A torchvision ResNet that gives the `encoded` photographs classes of their own, 0 to 39 and over again.

    A fresh network gives all of them the same, so that any two programs would agree. Here batch-norm statistics are
    those of the photographs, and the head is fitted to them (ridge regression), so that another way to resize gives
    the same class, and a picture moved by two pixels, or a row with another's key, does not.
    """
    import torch
    from torchvision import models

    from pipeline.inputs.images import decode

    torch.manual_seed(0)
    network = models.get_model(name, num_classes=NUM_CLASSES)
    for place, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average over what it sees
            if place.endswith("bn3" if hasattr(network.layer1[0], "bn3") else "bn2"):
                torch.nn.init.constant_(module.weight, 0.3)  # an untrained deep network amplifies every difference
    images = normalised(np.stack([decode(data, Transform(), 50_000_000).array for data in encoded]))
    head, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        network(images[: len(images) // 4 + 1])
        network.eval()
        embeddings = torch.cat([network(batch) for batch in images.split(20)]).double()
        mean = embeddings.mean(0)
        gram = (embeddings - mean) @ (embeddings - mean).T
        gram.diagonal().add_(0.001 * gram.diagonal().mean())
        wanted = torch.eye(NUM_CLASSES, dtype=torch.double)[torch.arange(len(images)) % NUM_CLASSES]
        weight = torch.linalg.solve(gram, wanted).T @ (embeddings - mean)
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)
    network.fc = head
    torch.save(network.state_dict(), path)


def normalised(pixels: np.ndarray) -> Any:
    """uint8 (B, H, W, 3) to a float32 tensor (B, 3, H, W) in channels_last, as the weights' preset scales it."""
    import torch

    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    return images.sub_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).div_(torch.tensor(IMAGENET_STD).view(3, 1, 1))


def torch_network(name: str, weights: str, channels_last: bool = False) -> Any:
    """The network as torchvision builds it, in eval mode."""
    import torch
    from torchvision import models

    network = models.get_model(name, num_classes=NUM_CLASSES)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def eager(name: str, weights: str) -> Classify:
    """torch as it is, in channels_last, on all cores."""
    import torch

    torch.set_num_threads(CORES)
    network = torch_network(name, weights, channels_last=True)

    def classify(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(network(normalised(pixels)).argmax(dim=1).numpy())

    return classify


def spec_of(name: str, weights: str) -> ModelSpec:
    """As a run would have it."""
    model = {"name": name, "weights": weights}
    return make_spec(make_config({"input": {"url": "unused"}, "model": model, "output": {"url": "unused"}}))


def openvino(name: str, weights: str, batch_size: int) -> Classify:
    """The network that `resnet-batch` takes on CPUs, cache included; all cores are at one batch, since here they
    come one after the other. Fewer images than `batch_size` are filled up."""
    check_installed()
    network = converted(spec_of(name, weights))
    network.reshape([batch_size, 224, 224, 3])
    engine = OpenVinoEngine(compiled(network, "f32", CORES))

    def classify(pixels: np.ndarray) -> np.ndarray:
        filled = pixels
        if len(pixels) < batch_size:
            filled = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
            filled[: len(pixels)] = pixels
        return np.asarray(engine(filled)[0][: len(pixels)].argmax(axis=1))

    return classify


def choose(network: str, name: str, weights: str, batch_size: int) -> Classify:
    """`eager` or `openvino`."""
    return openvino(name, weights, batch_size) if network == "openvino" else eager(name, weights)
