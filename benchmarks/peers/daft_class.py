"""Daft with its current class UDF (`@daft.cls`, `@daft.method.batch`): Parquet, and decode, crop and resize as Daft's
own expressions, on the native runner, which uses all cores.

Its pixels are (height, width, channel) already, which torch takes as channels_last without a copy; and with
`--network openvino` the class hosts the network that `resnet-batch` takes. Daft's resize knows fixed sizes only, so
the centre is cut out of the full picture first, to the pixel, and then resized. Of batches of 8, 16, 32, 64 and 100
those of 8 took the least CPU time with torch, and sleeping threads (OMP_WAIT_POLICY=passive) a tenth less than others.
"""

from __future__ import annotations

import daft
import numpy as np
from daft import DataType, Series, col
from daft import functions as do

from benchmarks import networks
from benchmarks.peers.arm import Order, note, take_order

PIXELS = DataType.image("RGB", 224, 224)


ORDER = take_order()


@daft.cls(max_concurrency=1)
class Network:
    def __init__(self, order: Order) -> None:
        self.times = order.times
        self.classify = networks.choose(order.network, order.model, str(order.weights), order.batch_size)

    @daft.method.batch(return_dtype=DataType.int64(), batch_size=ORDER.batch_size)
    def classes(self, images: Series) -> np.ndarray:
        array = images.to_arrow()
        values = getattr(array, "storage", array).flatten().to_numpy(zero_copy_only=False)
        found = self.classify(values.reshape(len(images), 224, 224, 3))
        note(self.times, len(found))
        return found


def centre() -> daft.Expression:
    """The box (x, y, width, height) that the preset leaves of a picture, in its own pixels."""
    width, height = (size(col("image")).cast(DataType.int32()) for size in (do.image_width, do.image_height))
    side = (do.when(width < height, width).otherwise(height) * (224 / 256)).round(0).cast(DataType.int32())
    numbers = ((width - side) / 2, (height - side) / 2, side, side)
    return do.to_list(*(number.cast(DataType.uint32()) for number in numbers))


def main(order: Order) -> None:
    images = daft.read_parquet(f"{order.folder}/*.parquet").with_column("image", do.decode_image(col("bytes")))
    images = images.select("key", do.resize(do.crop(col("image"), centre()), 224, 224).cast(PIXELS).alias("pixels"))
    network = Network(order)
    images.select("key", network.classes(col("pixels")).alias("class_id")).write_parquet(str(order.rows))


if __name__ == "__main__":
    main(ORDER)
