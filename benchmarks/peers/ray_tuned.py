"""Ray Data the way its own benchmark of multimodal inference does it (release/nightly_tests): encoded images from
Parquet, a `map` that decodes them as they are, a `map` that turns them into floats and has the preset resize those,
and batches of 100 to an eager network.

That benchmark has a GPU for the network; here its actor has all cores.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import ray
import torch
from torchvision.models import ResNet18_Weights
from torchvision.transforms import Compose, ToTensor

from benchmarks.networks import torch_network
from benchmarks.peers.arm import Order, note, take_order
from benchmarks.peers.ray_documented import start_ray

TRANSFORM = Compose([ToTensor(), ResNet18_Weights.IMAGENET1K_V1.transforms()])


def to_pixels(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    return {"key": row["key"], "image": np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))}


def to_floats(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": row["key"], "image": TRANSFORM(row["image"]).numpy()}


class Network:
    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads or 1)
        self.order = order
        self.network = torch_network(order.model, str(order.weights))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            classes = self.network(torch.from_numpy(batch["image"])).argmax(dim=1).numpy()
        note(self.order.times, len(classes))
        return {"key": batch["key"], "class_id": classes}


def main(order: Order) -> None:
    start_ray()
    images = ray.data.read_parquet(str(order.folder)).map(to_pixels).map(to_floats)
    predicted = images.map_batches(Network, fn_constructor_args=(order,), batch_size=order.batch_size, concurrency=1)
    predicted.write_parquet(str(order.rows))


if __name__ == "__main__":
    main(take_order(batch_size=100))
