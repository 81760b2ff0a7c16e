"""The keys of `optim` and `engine`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esam_dist.section import BelowOne, Faults, NonNegative, Positive, Real, Section


class OptimKeys(Section):
    """The base optimizer and its learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer that applies the sharpness-aware gradient."""
    lr: NonNegative = 0.1
    """Peak learning rate, for the global batch as it is (no hidden scaling)."""
    momentum: BelowOne = 0.9
    """SGD's momentum, or AdamW's beta1."""
    beta2: BelowOne = 0.999
    """AdamW's second-moment decay."""
    nesterov: bool = False
    """Nesterov's form of SGD's momentum."""
    weight_decay: NonNegative = 5e-4
    """L2 for SGD, decoupled for AdamW."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also applies to normalisation parameters and biases."""
    clip_grad_norm: NonNegative = 0.0
    """Largest global gradient norm of an update; 0: no clipping."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear warm-up from 0."""
    step_epochs: list[NonNegative] = []
    """For `schedule: step`: the epochs at which the rate is multiplied by `step_factor`."""
    step_factor: Annotated[Real, Field(gt=0.0, lt=1.0)] = 0.1
    """For `schedule: step`: the factor."""

    def faults(self) -> Faults:
        """Values that make no sense together."""
        return [
            (
                self.nesterov and (self.name != "sgd" or self.momentum == 0.0),
                "optim.nesterov = true needs optim.name = sgd and optim.momentum > 0; set it to false",
            ),
            (
                self.schedule == "step" and not self.step_epochs,
                "optim.schedule = step needs optim.step_epochs, such as [30, 60, 80]",
            ),
        ]


class EngineKeys(Section):
    """Who averages gradients and updates."""

    name: Literal["native", "deepspeed"] = "native"
    """`native`: one process or DDP; `deepspeed`: ZeRO."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage; at 3 all ranks share one perturbation (see docs/architecture.md)."""
    offload: bool = False
    """DeepSpeed keeps the optimizer's state and update on the CPU; needs `zero_stage` 1 or more."""
    # 600 is torch's own for NCCL, and no longer than `metrics.stall_seconds`: ranks that lost a peer are to fail by
    # themselves, with the reason in their log, before a probe ends them.
    collective_timeout_seconds: Positive = 600.0
    """A rank waits this long for the others, then fails: so a host that vanished is noticed. Longer than a checkpoint,
    for which the others wait at the end of a run, and than the largest lead of a rank in a validation."""
