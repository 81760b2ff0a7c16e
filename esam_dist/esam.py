"""One sharpness-aware step, distributed: ESAM (Du et al., ICLR 2022, Algorithm 1) and the methods beside it.

Shapes: B samples per rank, K classes, D samples that this rank keeps for the descent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esam_dist import descent, perturb
from esam_dist.ascent import Ascent, ascend, per_sample_loss
from esam_dist.batchnorm import frozen_batchnorm
from esam_dist.clock import PhaseClock
from esam_dist.coordinate import Coordination, Kept, keep_all
from esam_dist.data import Batch
from esam_dist.engine.base import Engine
from esam_dist.perturb import Perturbation, perturbed
from esam_dist.randomness import Randomness, seed_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule


class StepStats(NamedTuple):
    """What one step measured on this rank: scalars on the device, so that nothing waits for them."""

    loss: Tensor
    """Mean loss of the batch at the unperturbed weights (MSAM: at the perturbed ones, the only ones it visits)."""
    sharpness: Tensor
    """Mean rise of the loss under the perturbation, over the samples evaluated there; nan where none was."""
    num_kept: Tensor
    """Samples that this rank's descent used."""
    threshold: Tensor
    """Smallest score kept; nan where nothing was scored."""
    skipped: Tensor
    """1 where the ascent direction was not finite and the weights stayed unperturbed, else 0."""
    grad_norm: Tensor
    """Norm of the averaged gradient before clipping; nan where the micro-batch ended no update."""


class Memory:
    """What a method carries from step to step beyond weights and momentum: LookSAM's flat part, alike on all ranks."""

    def __init__(self) -> None:
        self.flat: list[Tensor] | None = None

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Copies on the CPU, for a checkpoint."""
        return {} if self.flat is None else {"flat": [tensor.cpu().clone() for tensor in self.flat]}

    def load_state_dict(self, state: dict[str, list[Tensor]], device: torch.device) -> None:
        """The reverse."""
        self.flat = [tensor.to(device) for tensor in state["flat"]] if state else None


def esam_step(
    engine: Engine,
    batch: Batch,
    rule: Rule,
    *,
    lr: float,
    ranks: Ranks,
    seed: tuple[int, ...],
    clock: PhaseClock,
    memory: Memory,
) -> StepStats:
    """Train on one micro-batch; the engine updates the weights when it was the last one of its update.

    `seed` names the batch within the run, this rank's among all: everything random in the step is a function of it,
    so there is no random state to carry from step to step, or to save.
    """
    generator = seed_step(*seed)
    if rule.is_plain:
        return _one_pass(engine, batch, rule, lr, clock, None)
    if rule.name == "msam":
        return _one_pass(engine, batch, rule, lr, clock, _along_momentum(engine, rule))

    # 1. This rank's own ascent direction, without traffic. Only here do BatchNorm's statistics move.
    before = Randomness.now(batch.images.device)
    ascent = ascend(engine, batch, rule, generator, ranks)
    loss_B = ascent.loss_B
    clock.end("ascent")
    if rule.reuses and memory.flat is not None:
        # What is not finite has to show: float16's scaler skips the update, and else the run stops.
        clean = _unscale(engine, ascent.eps.directions, torch.where(ascent.eps.finite, 1.0, torch.nan))
        _average(engine, ascent.eps, descent.with_flat_part(clean, memory.flat, rule.alpha))
        kept, rise = keep_all(loss_B), torch.full_like(loss_B, torch.nan)
    else:
        keeps_clean = rule.descent in ("recycled", "gsam", "looksam")
        with frozen_batchnorm(engine.module), perturbed(ascent.eps, keep_directions=keeps_clean):
            # 2. The samples whose loss rises most, among all ranks or within each.
            kept, rise_B = _keep(engine, batch, rule, ascent, before, ranks, clock)
            # 3. The gradient at w + eps, averaged over ranks by the engine.
            loss_D = _descend(engine, batch, rule, ascent, kept, ranks, memory)
            rise = loss_D - loss_B[kept.index_D] if rise_B is None else rise_B
    clock.end("descent")

    # 4. The update, at w. The optimizer may use the memory of the direction for its own copies.
    skipped = (~ascent.eps.finite).float()
    del ascent
    grad_norm = engine.step(lr)
    clock.end("update")
    return StepStats(loss_B.mean(), rise.mean(), kept.num_kept, kept.threshold, skipped, grad_norm)


def _keep(
    engine: Engine,
    batch: Batch,
    rule: Rule,
    ascent: Ascent,
    before: Randomness,
    ranks: Ranks,
    clock: PhaseClock,
) -> tuple[Kept, Tensor | None]:
    """The samples to keep, and the rise of every loss where it was measured."""
    if rule.gamma >= 1.0:
        return keep_all(ascent.loss_B), None
    rise_B, coordination = None, ascent.coordination
    if coordination is None:
        # Dropout draws again what it drew in the first forward: else selection would rank noise.
        with torch.no_grad(), before.replayed():
            rise_B = per_sample_loss(engine.module(batch.images), batch.labels, rule) - ascent.loss_B
        clock.end("score")
        coordination = Coordination(rise_B, rule, ranks)
    kept = coordination.end()
    clock.end("select")
    return kept, rise_B


def _descend(
    engine: Engine, batch: Batch, rule: Rule, ascent: Ascent, kept: Kept, ranks: Ranks, memory: Memory
) -> Tensor:
    """Give the engine the gradient of this step; returns the losses at w + eps, [D]."""
    images, labels = batch.images[kept.index_D], batch.labels[kept.index_D]
    if rule.descent in ("gsam", "looksam"):
        loss_D = per_sample_loss(engine.module(images), labels, rule)
        grads = torch.autograd.grad(
            engine.scale(loss_D.mean()), ascent.eps.params, allow_unused=True, materialize_grads=True
        )
        sharp = _unscale(engine, list(grads), None)
        clean = _unscale(engine, ascent.eps.directions, ascent.eps.finite.float())
        if rule.descent == "looksam":
            flat = descent.flat_part(clean, sharp)
            # An overflow in float16 costs one update, not all until the next perturbation.
            perturb.clear(flat)
            memory.flat = ranks.average(flat)
        else:
            sharp = descent.surrogate_gap(clean, sharp, rule.alpha)
        _average(engine, ascent.eps, sharp)
        return loss_D.detach()
    loss_D = per_sample_loss(engine(images), labels, rule)
    loss = kept.mean_over_ranks(loss_D)
    if rule.descent != "kept" and ascent.recycled:
        # Where the ascent gradient was not finite there is nothing to recycle.
        share = ascent.eps.finite.to(loss.dtype) * ascent.recycled_share
        recycled = descent.inject(ascent.eps.params, ascent.recycled) / engine.scale(torch.ones_like(share))
        loss = (1.0 - share) * loss + share * recycled
    engine.backward(loss)
    return loss_D.detach()


def _one_pass(
    engine: Engine, batch: Batch, rule: Rule, lr: float, clock: PhaseClock, eps: Perturbation | None
) -> StepStats:
    """A step of the base optimizer, at w or (MSAM) at weights perturbed without a pass."""

    def descend() -> Tensor:
        loss = per_sample_loss(engine(batch.images), batch.labels, rule).mean()
        engine.backward(loss)
        return loss.detach()

    if eps is None:
        loss = descend()
    else:
        with perturbed(eps):
            loss = descend()
    clock.end("descent")
    skipped = torch.zeros_like(loss) if eps is None else (~eps.finite).float()
    del eps
    grad_norm = engine.step(lr)
    clock.end("update")
    nan, num_kept = torch.full_like(loss, torch.nan), torch.full_like(loss, float(len(batch.labels)))
    return StepStats(loss, nan, num_kept, nan, skipped, grad_norm)


def _along_momentum(engine: Engine, rule: Rule) -> Perturbation:
    """MSAM (Becker et al. 2024, arXiv 2401.12033): `eps = -rho * v / ||v||`, with the optimizer's momentum v."""
    params = [param for param in engine.module.parameters() if param.requires_grad]
    return perturb.along(params, list(torch._foreach_neg(engine.momentum(params))), rule.radius)


def _average(engine: Engine, eps: Perturbation, grads: list[Tensor]) -> None:
    """Let the engine average gradients that were computed locally."""
    engine.backward(engine(lambda: descent.inject(eps.params, grads)))


def _unscale(engine: Engine, grads: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    """`grads` without the engine's loss scale, times `factor`."""
    one = torch.ones((), device=grads[0].device)
    scale = engine.scale(one)
    if scale is one and factor is None:
        return grads
    return list(torch._foreach_mul(grads, (one if factor is None else factor) / scale))
