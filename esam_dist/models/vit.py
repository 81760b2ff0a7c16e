"""The small vision transformer, for which torchvision has no name (Touvron et al., 2021, arXiv 2012.12877, table 1)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import VisionTransformer


def vit_s_16(num_classes: int, image_size: int = 224, **options: Any) -> nn.Module:
    """12 layers, 6 heads, 384 features: 22.1 million parameters. `options`: torchvision's, such as dropout."""
    model: nn.Module = VisionTransformer(
        image_size=image_size,
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
        num_classes=num_classes,
        **options,
    )
    return model
