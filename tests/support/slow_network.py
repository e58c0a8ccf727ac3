"""The digits' network, taking its time, so that there is a middle of a run in which to kill something."""

from __future__ import annotations

import time

from torch import nn

from pipeline.examples.network import digits_resnet20

SECONDS_PER_BATCH = 0.06


def build(num_classes: int = 10) -> nn.Module:
    network = digits_resnet20(num_classes)
    network.register_forward_pre_hook(lambda *_: time.sleep(SECONDS_PER_BATCH))
    return network
