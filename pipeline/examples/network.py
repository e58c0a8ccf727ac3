"""The demo's network: ResNet-20 of the paper's CIFAR family (He et al. 2015, section 4.2, n = 3)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchvision.models.resnet import BasicBlock


def digits_resnet20(num_classes: int = 10) -> nn.Module:
    """Untrained ResNet-20: float32 (N, 3, H, W), normally 32x32, to logits (N, num_classes).

    1 convolution, 3 stages of 3 blocks with 2 convolutions each, 1 linear layer. Where a stage changes the shape
    the shortcut is a projection (the paper's option B) rather than padding (option A, its choice for CIFAR),
    since that is what torchvision's block offers.
    """
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            stage1=_stage(16, 16, stride=1),
            stage2=_stage(16, 32, stride=2),
            stage3=_stage(32, 64, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, num_classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    projection = None
    if stride != 1 or inputs != outputs:
        projection = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = BasicBlock(inputs, outputs, stride=stride, downsample=projection)
    return nn.Sequential(first, BasicBlock(outputs, outputs), BasicBlock(outputs, outputs))
