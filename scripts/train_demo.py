"""Train the demo's ResNet-20 on the training part of scikit-learn's digits and write its checkpoint.

    python -m scripts.train_demo                # about three minutes on two cores
    python -m scripts.train_demo --epochs 2 --output /tmp/quick.safetensors

The number of epochs is fixed and the held-out part is looked at once, after the last of them, so that its accuracy
is an honest one. The pixels are those that the pipeline makes: PNG, RGB, Pillow's bilinear resize to 32x32.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.examples.digits import CHECKPOINT, encode_png, load_digits_images
from pipeline.examples.network import digits_resnet20

SIDE = 32
SHIFT = 0.15  # of half the side, so up to 2.4 pixels
ROTATION = math.radians(12)
SCALE = 0.12


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    digits = load_digits_images()
    inputs, labels = pixels(digits.images), torch.from_numpy(digits.labels)
    held_out = torch.from_numpy(digits.held_out)
    network = digits_resnet20().to(memory_format=torch.channels_last)
    train(network, inputs[~held_out], labels[~held_out], args.epochs, args.batch_size)
    correct = predict(network, inputs[held_out]) == labels[held_out]
    print(f"held-out accuracy {correct.double().mean():.2%} ({int(correct.sum())} of {len(correct)})")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, args.output, metadata={"format": "pt"})
    print(f"wrote {args.output} ({args.output.stat().st_size:,} bytes)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    return parser.parse_args()


def pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """(N, 8, 8) uint8 to (N, 3, 32, 32) float32 in 0..1, by way of the PNG file and Pillow."""
    rows = []
    for image in images:
        picture = Image.open(io.BytesIO(encode_png(image))).convert("RGB")
        rows.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255


def train(network: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, batch_size: int) -> None:
    steps = epochs * (len(inputs) // batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.2)
    started = time.monotonic()
    for epoch in range(epochs):
        network.train()
        total = 0.0
        # The last, smaller batch is left out; another shuffle brings its images in the next epoch.
        batches = torch.randperm(len(inputs)).split(batch_size)[: len(inputs) // batch_size]
        for rows in batches:
            logits = network(normalise(augment(inputs[rows])))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs} loss {total / len(batches):.3f} {time.monotonic() - started:.0f} s",
            flush=True,
        )


def augment(inputs: Tensor) -> Tensor:
    """Each image shifted, turned and scaled a little; what comes in from outside is black, as the paper is."""
    shift = uniform(len(inputs), 2) * SHIFT
    angle, scale = uniform(len(inputs)) * ROTATION, 1 + uniform(len(inputs)) * SCALE
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(inputs.shape), align_corners=False)
    return functional.grid_sample(inputs, grid, align_corners=False)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


def normalise(inputs: Tensor) -> Tensor:
    return ((inputs - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(network: nn.Module, inputs: Tensor) -> Tensor:
    network.eval()
    predicted: Tensor = network(normalise(inputs)).argmax(dim=1)
    return predicted


if __name__ == "__main__":
    main()
