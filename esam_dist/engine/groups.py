"""Which parameters share a learning rate and a weight decay: the groups that an optimizer is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esam_dist.engine.keys import OptimKeys
from esam_dist.layers import depths, head, matching, named_weights

FACTOR = "lr_factor"
"""The key under which a group keeps what its rate is, as a multiple of the schedule's."""


def param_groups(module: nn.Module, cfg: OptimKeys) -> list[dict[str, Any]]:
    """The trainable parameters of `module`, with the factor of their rate, and their weight decay.

    Raises UserError where a pattern of `optim.overrides` fits none of them.
    """
    trainable = {name: param for name, param in named_weights(module).items() if param.requires_grad}
    factors = dict.fromkeys(trainable, 1.0)
    if cfg.layer_decay < 1.0:
        depth = depths(module)
        factors = {name: cfg.layer_decay ** (max(depth.values()) - depth[name]) for name in trainable}
    if cfg.head_lr_factor != 1.0:
        top = set(head(module)[1].parameters())
        factors |= {name: factors[name] * cfg.head_lr_factor for name in trainable if trainable[name] in top}
    decays = {
        name: cfg.weight_decay if cfg.decay_norm_and_bias or is_decayed(name, param) else 0.0
        for name, param in trainable.items()
    }
    for override in cfg.overrides:
        for name in matching(trainable, override.match, "optim.overrides"):
            factors[name] *= override.lr_factor
            decays[name] = decays[name] if override.weight_decay is None else override.weight_decay
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in trainable.items():
        groups.setdefault((factors[name], decays[name]), []).append(param)
    return [
        {"params": params, "weight_decay": decay, FACTOR: factor, "lr": cfg.lr * factor}
        for (factor, decay), params in sorted(groups.items(), key=lambda group: -group[0][1])
    ]


def is_decayed(name: str, param: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: a kernel or a matrix.

    Not biases and the affine parameters of a normalisation, which have one dimension. Nor what has more and is no
    weight by its name: layer scale, class token, position tables, logit scale.
    """
    return param.ndim > 1 and "weight" in name.rpartition(".")[2]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(FACTOR, 1.0)
