"""The limit on these cores: reading and decoding alone (D), and the network alone on decoded images (N).

D has a process per core that reads tars and decodes them with our functions. N is the better of two ways to run
OpenVINO in fp32: a batch on each core, as `resnet-batch` does, and batch after batch on all cores. The answer is JSON
in `OUTPUT`/limit, in images/s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from benchmarks import networks
from benchmarks.feeding import limit
from benchmarks.peers.arm import Order, take_order
from benchmarks.photographs import samples
from pipeline.config import Transform
from pipeline.inputs.images import decode
from pipeline.model.openvino_engine import compiled, converted

BATCH_SIZE = 32
SECONDS = 6.0


def main(order: Order) -> None:
    tars = sorted(order.folder.glob("*.tar"))
    found = {"decoding": limit(tars)}
    encoded = [data for _, data in samples(tars[0])]
    pixels = np.stack([decode(encoded[n % len(encoded)], Transform(), 50_000_000).array for n in range(4 * BATCH_SIZE)])
    batches = pixels.reshape(4, BATCH_SIZE, 224, 224, 3)
    in_turn = networks.openvino(order.model, str(order.weights), BATCH_SIZE)
    found["network_in_turn"] = rate(lambda number: in_turn(batches[number % 4]), lambda: None)
    queue = streams(order)
    found["network_streams"] = rate(lambda number: queue.start_async([batches[number % 4]]), queue.wait_all)
    (order.output / "limit").write_text(json.dumps(found))


def streams(order: Order):
    """A queue that computes a batch on each core."""
    import openvino

    network = converted(networks.spec_of(order.model, str(order.weights)))
    network.reshape([BATCH_SIZE, 224, 224, 3])
    return openvino.AsyncInferQueue(compiled(network, "f32", networks.CORES, streams=networks.CORES), networks.CORES)


def rate(work: Callable[[int], object], finish: Callable[[], object]) -> float:
    """Images/s of a call per batch, once it is warm."""
    for number in range(4):
        work(number)
    finish()
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + SECONDS:
        work(count)
        count += 1
    finish()
    return count * BATCH_SIZE / (time.perf_counter() - start)


if __name__ == "__main__":
    main(take_order())
