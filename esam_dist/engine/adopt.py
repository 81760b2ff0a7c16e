"""An engine around a model that somebody else has made: bare, in DDP, or under DeepSpeed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from esam_dist.engine.native import NativeEngine, UpdateOptions
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.step.engine import Engine


def adopt(model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks, options: UpdateOptions) -> Engine:
    """The engine for `model`; a bare one is put into DDP where there are several ranks.

    Raises UserError for what does not go together.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        return _adopt_deepspeed(model, optimizer, ranks, options)
    if optimizer is None:
        raise UserError("optimizer = None: give the optimizer of the model's parameters")
    return NativeEngine(model, optimizer, ranks, options)


def _adopt_deepspeed(ds: Any, optimizer: torch.optim.Optimizer | None, ranks: Ranks, options: UpdateOptions) -> Engine:
    from esam_dist.engine.deepspeed import DeepSpeedEngine
    from esam_dist.engine.zero3 import Zero3Engine

    if options != UpdateOptions():
        raise UserError(
            "accumulate, clip_grad_norm and scaler are DeepSpeed's here: set gradient_accumulation_steps and "
            "gradient_clipping in its configuration, and none of these"
        )
    if ds.fp16_enabled() or ds.bfloat16_enabled():
        raise UserError(
            "DeepSpeed holds the weights in 16 bits, in which most of them cannot hold a perturbation: leave its fp16 "
            "and bf16 off, and give autocast=torch.bfloat16"
        )
    kind = Zero3Engine if ds.zero_optimization_stage() == 3 else DeepSpeedEngine
    return kind(ds, optimizer or ds.basic_optimizer, ranks)
