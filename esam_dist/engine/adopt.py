"""An engine around a model that somebody else has made: bare, in DDP, or under DeepSpeed."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist.engine.native import NativeEngine, UpdateOptions
from esam_dist.engine.state import momentum_factor
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.step.engine import Engine


class Adopted(NamedTuple):
    """An engine, and what is settled with it."""

    engine: Engine
    accumulate: int
    """Micro-batches per update."""
    momentum: float
    """The optimizer's (of Adam's kind: beta1); 0: it has none."""
    native: NativeEngine | None = None
    """The engine, where it counts the micro-batches itself; None: DeepSpeed's configuration says how many there are."""


def adopt(model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks, options: UpdateOptions) -> Adopted:
    """The engine for `model`; a bare one is put into DDP where there are several ranks.

    Raises UserError for what does not go together.
    """
    refuse_layers(model)
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        return _adopt_deepspeed(model, optimizer, ranks, options)
    if optimizer is None:
        raise UserError("optimizer = None: give the optimizer of the model's parameters")
    refuse_optimizer(model, optimizer)
    if isinstance(model, DistributedDataParallel) and model.process_group.size() != ranks.world_size:
        raise UserError(
            f"the model is in DDP over {model.process_group.size()} of {ranks.world_size} ranks: a step is agreed on "
            "by all ranks, so leave process_group out"
        )
    engine = NativeEngine(model, optimizer, ranks, options)
    return Adopted(engine, options.accumulate, momentum_factor(optimizer), engine)


def refuse_layers(model: nn.Module) -> None:
    """Raise UserError for weights that cannot be perturbed in place: none, sharded ones, or with sparse gradients."""
    if not any(param.requires_grad for param in model.parameters()):
        raise UserError(f"model of type {type(model).__name__} has no parameters to train: check requires_grad")
    # By name: their packages are not imported for whoever does not use them.
    kinds = {type(part).__name__ for part in (*model.modules(), *model.parameters())}
    if kinds & {"FullyShardedDataParallel", "DTensor"}:
        raise UserError("the model's weights are sharded by FSDP or as DTensor: use DDP, or DeepSpeed's ZeRO 1, 2 or 3")
    for name, child in model.named_modules():
        if getattr(child, "sparse", False) is True:
            raise UserError(
                f"layer {name!r} has sparse gradients, which have no norm to climb along: give sparse=False"
            )


def refuse_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for the optimizer of another model, or made before its weights were replaced."""
    held = {param for group in optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise UserError(
            f"optimizer = {type(optimizer).__name__} holds none of the model's parameters: make it from "
            "model.parameters(), after the model is on its device"
        )


def _adopt_deepspeed(ds: Any, optimizer: torch.optim.Optimizer | None, ranks: Ranks, options: UpdateOptions) -> Adopted:
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
    # Only its own forward would run under it, and not the one for the ascent.
    if getattr(ds, "torch_autocast_enabled", bool)():
        raise UserError("torch_autocast = true is DeepSpeed's: leave it off, and give autocast=torch.bfloat16")
    stage = ds.zero_optimization_stage()
    if stage == 3:
        _refuse_zero3(ds)
    kind = Zero3Engine if stage == 3 else DeepSpeedEngine
    inner = ds.basic_optimizer
    if inner is None or not any(optimizer is known for known in (None, inner, ds.optimizer)):
        raise UserError(
            f"optimizer = {type(optimizer).__name__} is not the one that deepspeed.initialize has: give it that one, "
            "and None here"
        )
    return Adopted(kind(ds, inner, ranks), int(ds.gradient_accumulation_steps()), momentum_factor(inner))


def _refuse_zero3(ds: Any) -> None:
    whole = next((name for name, param in ds.module.named_parameters() if getattr(param, "ds_persist", False)), None)
    if whole is not None:
        raise UserError(
            f"ZeRO 3 holds {whole} whole on every rank, beside the shards that are perturbed: set "
            "stage3_param_persistence_threshold = 0 in DeepSpeed's configuration"
        )
    if ds.gradient_accumulation_steps() > 1:
        raise UserError(
            "ZeRO 3 needs the averaged gradient of one batch: set gradient_accumulation_steps = 1 in DeepSpeed's "
            "configuration, or stage 0, 1 or 2"
        )
    if ds.zero_offload_optimizer() is not None:
        raise UserError(
            "offload_optimizer moves the averaged gradient away, along which ZeRO 3 perturbs: leave it out, or use "
            "stage 1 or 2"
        )
