"""The network as it is trained and evaluated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Classifier(nn.Module):
    """A network whose forward passes run under autocast: images [B, 3, H, W] to logits [B, K] in float32.

    Weights stay in float32 whatever `precision` is: in bfloat16 most could not represent a perturbation of size rho.
    """

    def __init__(self, network: nn.Module, precision: str = "fp32", *, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self._format = torch.channels_last if channels_last else torch.preserve_format
        network.to(memory_format=self._format)
        self._autocast_type = AUTOCAST_TYPES[precision]
        self.held: tuple[str, ...] = ()
        """Layers of `network` that stay in evaluation mode: frozen BatchNorm."""

    def train(self, mode: bool = True) -> Self:
        """As every module, but for the layers that are held."""
        super().train(mode)
        for name in self.held:
            self.network.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K], float32."""
        images = images.to(memory_format=self._format)
        if self._autocast_type is None:
            return self.network(images)  # type: ignore[no-any-return]
        with torch.autocast(images.device.type, self._autocast_type):
            logits: Tensor = self.network(images)
        return logits.float()
