"""What is compared: every method and mode, and on which networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import nn

from esam_dist.models import build_model
from esam_dist.rule import Rule

RHO = 0.05


def sharp(name: str, **choices: Any) -> Rule:
    """A rule that perturbs, at the usual radius."""
    return Rule(name, rho=RHO, radius=RHO, **choices)


def esam(beta: float = 0.5, gamma: float = 0.5, **choices: Any) -> Rule:
    """ESAM at the paper's beta and gamma, or others."""
    return sharp("esam", beta=beta, gamma=gamma, **choices)


LOOKSAM = sharp("looksam", descent="looksam", alpha=0.2)
MODES: dict[str, Rule] = {
    "sgd": Rule(),
    "sam": sharp("sam"),
    "asam": sharp("asam", adaptive_eta=0.01),
    "gsam": sharp("gsam", descent="gsam", alpha=0.2),
    "looksam, perturbed step": LOOKSAM,
    "looksam, step between": sharp("looksam", descent="looksam", alpha=0.2, reuses=True),
    "msam": sharp("msam"),
    "esam (paper): tensor, forward": esam(),
    "esam: element, forward": esam(swp="element"),
    "esam: tensor, head": esam(score="head"),
    "esam: tensor, loss": esam(score="loss"),
    "esam: tensor, random": esam(score="random"),
    "esam: norm, head": esam(swp="norm", score="head"),
    "esam: suffix, head": esam(swp="suffix", score="head"),
    "esam: suffix 0.25, head": esam(0.25, swp="suffix", score="head"),
    "esam: global, scores": esam(scope="global"),
    "esam: global, thresholds": esam(scope="global", transport="thresholds"),
    "esam: global, capacity 1.25": esam(scope="global", capacity_factor=1.25),
    "recycled 0.25, random": esam(1.0, 0.25, score="random", descent="recycled"),
    "recycled 0.25, exact": esam(1.0, 0.25, score="random", descent="recycled_exact"),
    "recycled 0.25, head": esam(1.0, 0.25, score="head", descent="recycled"),
    "recycled 0.25, forward": esam(1.0, 0.25, descent="recycled"),
}


@dataclass(frozen=True)
class Model:
    """A network to measure, and on what."""

    build: Callable[[], nn.Module]
    pixels: int
    num_classes: int
    batch_size: int


def vit_small() -> nn.Module:
    """ViT-S/16 (Touvron et al. 2021, table 1), which torchvision does not name: 22 million parameters."""
    return torchvision.models.VisionTransformer(  # type: ignore[no-any-return]
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )


MODELS = {
    "cifar_resnet18": Model(lambda: build_model("cifar_resnet18", 10), 32, 10, 32),
    "resnet50": Model(lambda: build_model("resnet50", 1000), 224, 1000, 16),
    "vit_small": Model(vit_small, 224, 1000, 16),
}
