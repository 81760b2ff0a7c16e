"""From configuration to optimizer and engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from esam_dist.engine.groups import param_groups
from esam_dist.engine.keys import EngineKeys, OptimKeys
from esam_dist.engine.native import NativeEngine, UpdateOptions
from esam_dist.methods import Method
from esam_dist.ranks import Ranks
from esam_dist.step.engine import Engine
from esam_dist.train_keys import TrainKeys


class MicroBatches(NamedTuple):
    """What an update is made of on each rank."""

    size: int
    """Samples of each."""
    accumulate: int
    """Micro-batches per update."""
    fp16: bool
    """Whether they are computed in float16, which needs a loss scale."""

    @staticmethod
    def of(batch_size: int, train: TrainKeys, method: Method) -> MicroBatches:
        """Those of a configuration: each group of a batch is a micro-batch of its own."""
        num_groups = method.num_groups(batch_size)
        return MicroBatches(batch_size // num_groups, train.accumulate * num_groups, train.precision == "fp16")


def build_engine(
    module: nn.Module, ranks: Ranks, optim: OptimKeys, engine: EngineKeys, batches: MicroBatches
) -> Engine:
    """The engine that `engine.name` asks for, with the optimizer that `optim` describes."""
    # ZeRO has shards of its own to update, and looks at their gradients itself.
    whole = engine.name == "native" or engine.zero_stage == 0
    optimizer = build_optimizer(module, optim, fused=whole)
    if engine.name == "native":
        scaler = torch.amp.GradScaler(ranks.device.type, enabled=batches.fp16)
        options = UpdateOptions(batches.accumulate, optim.clip_grad_norm, scaler)
        return NativeEngine(module, optimizer, ranks, options)
    from esam_dist.engine.deepspeed import DeepSpeedEngine, deepspeed_config, initialize
    from esam_dist.engine.zero3 import Zero3Engine

    ds_config = deepspeed_config(
        batch_size=batches.size,
        accumulate=batches.accumulate,
        zero_stage=engine.zero_stage,
        clip_grad_norm=optim.clip_grad_norm,
        offload=engine.offload,
    )
    ds = initialize(module, optimizer, ranks, ds_config, engine.collective_timeout_seconds)
    kind = Zero3Engine if engine.zero_stage == 3 else DeepSpeedEngine
    built = kind(ds, optimizer, ranks, fp16=batches.fp16)
    built.make_shards()
    return built


def build_optimizer(module: nn.Module, cfg: OptimKeys, *, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters, each with its rate and weight decay.

    `fused`: one that can skip an update without a wait for the device.
    """
    groups = param_groups(module, cfg)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.momentum, cfg.beta2), fused=fused)
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
