"""What is compared: every method and mode, and on which networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import nn

from esam_dist import methods
from esam_dist.models import build_model


def esam(beta: float = 0.5, scope: str = "rank", **choices: Any) -> methods.ESAM:
    """ESAM at the paper's beta and gamma, or others."""
    return methods.ESAM(beta=beta, scope=scope, **choices)


def recycled(scope: str = "rank", **choices: Any) -> methods.Recycled:
    """A quarter of the samples descends, and the ascent's gradient is used again."""
    return methods.Recycled(gamma=0.25, scope=scope, **choices)


MODES: dict[str, methods.Method] = {
    "sgd": methods.SGD(),
    "sam": methods.SAM(),
    "asam": methods.ASAM(),
    "gsam": methods.GSAM(),
    "looksam, perturbed step": methods.LookSAM(),
    "looksam, step between": methods.LookSAM(),
    "msam": methods.MSAM(),
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
    "recycled 0.25, random": recycled(),
    "recycled 0.25, exact": recycled(exact=True),
    "recycled 0.25, head": recycled(score="head"),
    "recycled 0.25, forward": recycled(score="forward"),
}


def update_of(mode: str, seed: int) -> int:
    """The number of an update of `mode`: everything random in it is a function of that."""
    method = MODES[mode]
    if isinstance(method, methods.LookSAM):
        return method.interval * seed + (mode == "looksam, step between")
    return seed


def draws_early(mode: str) -> bool:
    """Whether a step's cost depends on what it draws."""
    method = MODES[mode]
    return isinstance(method, methods.ESAM) and method.swp in ("tensor", "suffix")


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
