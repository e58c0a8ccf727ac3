"""webdataset and torch's DataLoader: workers read tars, decode with Pillow, resize as the preset does and make
batches; the main process hosts the network.

A worker per core, and pixels as uint8. Of batches of 8, 16 and 32 those of 8 took the least CPU time with torch, by
some 6 %, and threads that sleep while they wait (OMP_WAIT_POLICY=passive) halved it on a busy machine, where workers
need the cores.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, Resize

from benchmarks import networks
from benchmarks.peers.arm import Order, note, take_order

TRANSFORM = Compose([Resize(256), CenterCrop(224), np.asarray])


def stack(samples: list[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    keys, pixels = zip(*samples, strict=True)
    return list(keys), np.stack(pixels)


def main(order: Order) -> None:
    tars = [str(path) for path in sorted(order.folder.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb").to_tuple("__key__", "jpg;jpeg;png")
    batches = samples.map_tuple(None, TRANSFORM).batched(order.batch_size, collation_fn=stack)
    workers = min(networks.CORES, len(tars))
    loader = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4)
    classify = networks.choose(order.network, order.model, str(order.weights), order.batch_size)
    keys: list[str] = []
    classes: list[np.ndarray] = []
    for batch_keys, pixels in loader:
        keys += batch_keys
        classes.append(classify(np.asarray(pixels)))
        note(order.times, len(batch_keys))
    order.rows.mkdir()
    pq.write_table(pa.table({"key": keys, "class_id": np.concatenate(classes)}), order.rows / "rows.parquet")


if __name__ == "__main__":
    main(take_order())
