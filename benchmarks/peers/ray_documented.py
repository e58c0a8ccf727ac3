"""Ray Data as its documentation has it for images in tars: `read_webdataset`, a `map` with Pillow and the weights'
preset, `map_batches` with an eager network in an actor, `write_parquet`.

Ray gives an actor one thread; `--threads` gives it all cores. With batches of 8 the network takes some 20 % less time
per image than with 32, so the arm on all cores has these.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import ray
import torch
from torchvision.models import ResNet18_Weights

from benchmarks.networks import torch_network
from benchmarks.peers.arm import Order, note, take_order
from pipeline.cluster import on_loopback


class Network:
    """The documented predictor."""

    def __init__(self, order: Order) -> None:
        if order.threads:
            torch.set_num_threads(order.threads)
        self.order = order
        self.network = torch_network(order.model, str(order.weights))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            classes = self.network(torch.as_tensor(np.stack(batch["image"]))).argmax(dim=1).numpy()
        note(self.order.times, len(classes))
        return {"key": batch["key"], "class_id": classes}


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    data = next(row[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in row)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {"key": row["__key__"], "image": ResNet18_Weights.IMAGENET1K_V1.transforms()(image).numpy()}


def start_ray() -> None:
    with on_loopback():
        ray.init(include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False


def main(order: Order) -> None:
    start_ray()
    samples = ray.data.read_webdataset([str(path) for path in sorted(order.folder.glob("*.tar"))], decoder=None)
    images = samples.map(preprocess)
    predicted = images.map_batches(
        Network, fn_constructor_args=(order,), batch_size=order.batch_size, compute=ray.data.ActorPoolStrategy(size=1)
    )
    predicted.write_parquet(str(order.rows))


if __name__ == "__main__":
    main(take_order())
