"""Residual networks for images of 32 pixels: 3x3 stem, no pooling before the first stage.

cifar_resnet8, cifar_resnet20   three stages of 16, 32, 64 channels, 6n + 2 layers (He et al. 2016, section 4.2)
cifar_resnet18                  the four stages of the ImageNet ResNet-18, as the SAM and ESAM papers use on CIFAR
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cifar_resnet8(num_classes: int) -> nn.Module:
    """78 thousand parameters: small enough for a CPU."""
    return CifarResNet(num_classes, widths=(16, 32, 64), depth=1)


def cifar_resnet20(num_classes: int) -> nn.Module:
    """0.27 million parameters."""
    return CifarResNet(num_classes, widths=(16, 32, 64), depth=3)


def cifar_resnet18(num_classes: int) -> nn.Module:
    """11.2 million parameters."""
    return CifarResNet(num_classes, widths=(64, 128, 256, 512), depth=2)


class CifarResNet(nn.Module):
    """Stages of `depth` basic blocks each; every stage after the first halves height and width."""

    def __init__(self, num_classes: int, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(depth):
                blocks.append(BasicBlock(before, width, stride=2 if stage > 0 and block == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, K]."""
        features: Tensor = self.blocks(self.stem(images))
        return self.head(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(channels_in, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = _conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C, H / stride, W / stride]."""
        hidden = F.relu(self.norm1(self.conv1(features)), inplace=True)
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(features))


def _conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
