"""Pyramidal residual networks for images of 32 pixels (Han, Kim and Kim, CVPR 2017, arXiv 1610.02915).

The number of channels grows by alpha / (number of blocks) in every block (the paper's additive form), from 16 to
16 + alpha. Depth 110 without bottlenecks: three groups of 18 blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pyramidnet110(num_classes: int) -> nn.Module:
    """Alpha 270, 28.3 million parameters: what the ESAM paper trains."""
    return PyramidNet(num_classes, depth=110, alpha=270)


def pyramidnet110_a84(num_classes: int) -> nn.Module:
    """Alpha 84, 3.8 million parameters."""
    return PyramidNet(num_classes, depth=110, alpha=84)


def pyramidnet110_a48(num_classes: int) -> nn.Module:
    """Alpha 48, 1.7 million parameters."""
    return PyramidNet(num_classes, depth=110, alpha=48)


class PyramidNet(nn.Module):
    """Additive PyramidNet of basic blocks."""

    def __init__(self, num_classes: int, depth: int, alpha: int) -> None:
        super().__init__()
        per_group = (depth - 2) // 6
        num_blocks = 3 * per_group
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        blocks: list[nn.Module] = []
        before = 16
        for block in range(num_blocks):
            channels = 16 + round(alpha * (block + 1) / num_blocks)
            blocks.append(PyramidBlock(before, channels, stride=2 if block in (per_group, 2 * per_group) else 1))
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, K]."""
        features = torch.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class PyramidBlock(nn.Module):
    """Normalisation, 3x3, normalisation, ReLU, 3x3, normalisation; no ReLU first, as the paper found best.

    The shortcut has no parameters: average pooling where the size halves, zeros for the channels that are new.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C, H / stride, W / stride]."""
        hidden = self.conv2(torch.relu(self.norm2(self.conv1(self.norm1(features)))))
        beside = F.avg_pool2d(features, 2, ceil_mode=True) if self.stride == 2 else features
        return self.norm3(hidden) + F.pad(beside, (0, 0, 0, 0, 0, self.new_channels))  # type: ignore[no-any-return]
