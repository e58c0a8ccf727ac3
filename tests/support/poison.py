"""Images that kill whoever decodes them, or predicts them: real deaths of real workers.

`python -m tests.support.poison CONFIG ADDRESS` is a run whose workers die of the images made here.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipeline.examples.digits import encode_png

if TYPE_CHECKING:
    from torch import nn

KILLS_PREDICTOR = encode_png(np.full((8, 8), 255, np.uint8))  # all white
KILLS_DECODER = encode_png(np.full((9, 9), 7, np.uint8))
ROOT = Path(__file__).parents[2]


def build(num_classes: int = 10) -> nn.Module:
    """The digits' network. It dies of a white image among others; alone, that leaves a device in trouble that lasts, as
    an illegal access does."""
    from pipeline.examples.network import digits_resnet20

    network = digits_resnet20(num_classes)
    network.register_forward_pre_hook(lambda _, inputs: _harm(inputs[0]))
    return network


def _harm(pixels: Any) -> None:
    import torch

    flat = pixels.flatten(1)
    if bool((flat.min(dim=1).values > 0.99).any()):
        if int((flat.max(dim=1).values > -0.99).sum()) > 1:  # what pads a batch is black
            _die()
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _die() -> None:
    """As of a bug: at once. A signal to the process is handled by its main thread, and this one would go on meanwhile."""
    signal.raise_signal(signal.SIGSEGV)


def poison_decoding() -> None:
    """Set up a worker so that it dies of KILLS_DECODER, as of a bug in a decoder."""
    from pipeline.inputs import stream

    decode = stream.decode

    def deadly(data: bytes, *args: Any) -> Any:
        if data == KILLS_DECODER:
            _die()
        return decode(data, *args)

    stream.decode = deadly


def main(config: str, address: str) -> int:
    import ray

    import pipeline
    from pipeline.cluster import on_loopback

    environment = {
        "env_vars": {"PYTHONPATH": str(ROOT)},
        "worker_process_setup_hook": "tests.support.poison.poison_decoding",
    }
    with on_loopback():
        ray.init(address, runtime_env=environment)
    report = pipeline.run(yaml.safe_load(config))
    print(report)
    return int(report.exit_code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
