"""A network by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torchvision
from torch import nn

from esam_dist.errors import UserError
from esam_dist.models.cifar_resnet import cifar_resnet8, cifar_resnet18, cifar_resnet20
from esam_dist.models.pyramidnet import pyramidnet110, pyramidnet110_a48, pyramidnet110_a84
from esam_dist.models.vit import vit_s_16
from esam_dist.models.wide_resnet import wrn16_4, wrn28_10

OURS: dict[str, Callable[[int], nn.Module]] = {
    "cifar_resnet8": cifar_resnet8,
    "cifar_resnet18": cifar_resnet18,
    "cifar_resnet20": cifar_resnet20,
    "wrn16_4": wrn16_4,
    "wrn28_10": wrn28_10,
    "pyramidnet110": pyramidnet110,
    "pyramidnet110_a48": pyramidnet110_a48,
    "pyramidnet110_a84": pyramidnet110_a84,
    "vit_s_16": vit_s_16,
}


def model_names() -> list[str]:
    """Every name that `build_model` knows, ours first."""
    return [*OURS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(name: str, num_classes: int) -> nn.Module:
    """The network `name` with `num_classes` outputs, freshly initialised from torch's generator.

    Raises UserError, naming the nearest names, when there is none.
    """
    if name in OURS:
        return OURS[name](num_classes)
    if name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=3, cutoff=0.4) or ["resnet50"]
        raise UserError(f"model.name = {name!r} is unknown; did you mean {', '.join(near)}?")
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **_extra(name))
    return model


def expression(name: str, num_classes: int) -> str:
    """The network `name` in Python, for whoever has its weights: of torchvision's, without this package."""
    if name in OURS:
        return f"esam_dist.models.build_model({name!r}, {num_classes})"
    extra = "".join(f", {key}={value}" for key, value in _extra(name).items())
    return f"torchvision.models.get_model({name!r}, weights=None, num_classes={num_classes}{extra})"


def _extra(name: str) -> dict[str, bool]:
    # Networks with auxiliary heads or outputs return something other than logits in training.
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
