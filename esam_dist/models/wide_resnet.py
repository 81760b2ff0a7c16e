"""Wide residual networks for images of 32 pixels (Zagoruyko and Komodakis, 2016, arXiv 1605.07146).

Three groups of (depth - 4) / 6 pre-activation blocks, with 16, 32 and 64 channels times `width`; no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wrn28_10(num_classes: int) -> nn.Module:
    """36.5 million parameters."""
    return WideResNet(num_classes, depth=28, width=10)


def wrn16_4(num_classes: int) -> nn.Module:
    """2.7 million parameters: the same network at a size for one small GPU."""
    return WideResNet(num_classes, depth=16, width=4)


class WideResNet(nn.Module):
    """WRN-depth-width."""

    def __init__(self, num_classes: int, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = 16
        for group, channels in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(before, channels, stride=2 if group > 0 and block == 0 else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, K]."""
        features = torch.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class WideBlock(nn.Module):
    """Twice normalisation, ReLU, 3x3 convolution; where the shape changes, the shortcut starts after the first ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C, H / stride, W / stride]."""
        active = torch.relu(self.norm1(features))
        beside = features if self.shortcut is None else self.shortcut(active)
        hidden = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return beside + hidden  # type: ignore[no-any-return]
