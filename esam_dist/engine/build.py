"""From configuration to optimizer and engine."""

from __future__ import annotations

import torch
from torch import nn

from esam_dist import config
from esam_dist.engine.native import NativeEngine, UpdateOptions
from esam_dist.ranks import Ranks
from esam_dist.step.engine import Engine


def build_engine(module: nn.Module, cfg: config.Config, ranks: Ranks) -> Engine:
    """The engine that `engine.name` asks for, with the optimizer that `optim` describes."""
    # ZeRO has shards of its own to update, and looks at their gradients itself.
    whole = cfg.engine.name == "native" or cfg.engine.zero_stage == 0
    optimizer = build_optimizer(module, cfg.optim, fused=whole)
    # Each group of a batch is a micro-batch of its own.
    num_groups = cfg.method.num_groups(cfg.data.batch_size)
    accumulate, fp16 = cfg.train.accumulate * num_groups, cfg.train.precision == "fp16"
    if cfg.engine.name == "native":
        scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        return NativeEngine(module, optimizer, ranks, UpdateOptions(accumulate, cfg.optim.clip_grad_norm, scaler))
    from esam_dist.engine.deepspeed import DeepSpeedEngine, deepspeed_config, initialize
    from esam_dist.engine.zero3 import Zero3Engine

    ds_config = deepspeed_config(
        batch_size=cfg.data.batch_size // num_groups,
        accumulate=accumulate,
        zero_stage=cfg.engine.zero_stage,
        clip_grad_norm=cfg.optim.clip_grad_norm,
        offload=cfg.engine.offload,
    )
    ds = initialize(module, optimizer, ranks, ds_config, cfg.engine.collective_timeout_seconds)
    kind = Zero3Engine if cfg.engine.zero_stage == 3 else DeepSpeedEngine
    engine = kind(ds, optimizer, ranks, fp16=fp16)
    engine.make_shards()
    return engine


def build_optimizer(module: nn.Module, cfg: config.Optim, *, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters, with or without decay of normalisation parameters and biases.

    `fused`: one that can skip an update without a wait for the device.
    """
    trainable = [param for param in module.parameters() if param.requires_grad]
    # Biases and the affine parameters of every normalisation are the tensors with fewer than two dimensions.
    decayed = [param for param in trainable if param.ndim > 1 or cfg.decay_norm_and_bias]
    undecayed = [param for param in trainable if not (param.ndim > 1 or cfg.decay_norm_and_bias)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, cfg.weight_decay), (undecayed, 0.0))
        if params
    ]
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.momentum, cfg.beta2), fused=fused)
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
