"""One ESAM step (Du et al., ICLR 2022, Algorithm 1), distributed: to be read beside the paper.

Shapes: W ranks, B samples per rank, K classes, D samples that this rank keeps for the descent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from esam_dist import config, perturb, selection
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.base import Engine
from esam_dist.ranks import Ranks


@dataclass(frozen=True)
class Rule:
    """What one step does: the method's configuration with its schedules read at one epoch."""

    rho: float
    beta: float
    gamma: float
    scope: str
    swp_scale: str
    label_smoothing: float

    @staticmethod
    def at(epoch: float, method: config.Method, label_smoothing: float) -> Rule:
        """The rule at `epoch`: SGD has no radius; SAM perturbs everything and keeps everything."""
        rho = 0.0 if method.name == "sgd" else method.rho(epoch)
        beta, gamma = (method.beta(epoch), method.gamma(epoch)) if method.name == "esam" else (1.0, 1.0)
        return Rule(rho, beta, gamma, method.scope, method.swp_scale, label_smoothing)


class StepStats(NamedTuple):
    """What one step measured on this rank: scalars on the device, so that nothing waits for them."""

    loss: Tensor
    """Mean loss of the batch at the unperturbed weights."""
    sharpness: Tensor
    """Mean rise of the loss under the perturbation, over the samples evaluated there; 0 for a plain step."""
    num_kept: Tensor
    """Samples that this rank's descent used."""
    threshold: Tensor
    """Smallest score kept; nan where nothing was scored."""
    skipped: Tensor
    """1 where the ascent gradient was not finite and the weights stayed unperturbed, else 0."""
    grad_norm: Tensor
    """Norm of the averaged gradient before clipping; nan where the micro-batch ended no update."""


def esam_step(
    engine: Engine, batch: Batch, rule: Rule, *, lr: float, ranks: Ranks, seed: tuple[int, ...], clock: PhaseClock
) -> StepStats:
    """Train on one micro-batch; the engine updates the weights when it was the last one of its update.

    `seed` names the micro-batch within the run: everything random in the step is a function of it and of the rank,
    so there is no random state to carry from step to step, or to save.
    """
    generator = seed_step(*seed, ranks.rank)
    if rule.rho == 0.0:
        return _plain_step(engine, batch, rule, lr, clock)

    # 1. The only forward that moves BatchNorm statistics; this rank's own ascent direction, without traffic.
    randomness = _random_state(batch.images.device)
    loss_B = per_sample_loss(engine.module(batch.images), batch.labels, rule)
    drawn = perturb.draw_tensors(engine.module, rule.beta, generator)
    grads = torch.autograd.grad(engine.scale(loss_B.mean()), drawn, allow_unused=True)
    used = [(param, grad) for param, grad in zip(drawn, grads, strict=True) if grad is not None]
    eps = perturb.ascent(
        [param for param, _ in used],
        [grad for _, grad in used],
        perturb.radius(rule.rho, rule.beta, rule.swp_scale),
    )
    loss_B = loss_B.detach()
    clock.end("ascent")

    with perturb.frozen_batchnorm(engine.module), perturb.perturbed(eps):
        # 2. SDS: the samples whose loss rises most, chosen among all ranks or within each.
        kept = Kept(torch.arange(len(loss_B), device=loss_B.device), 1.0 / len(loss_B), loss_B.new_tensor(torch.nan))
        score_B = None
        if rule.gamma < 1.0:
            with torch.no_grad(), _replayed(randomness, batch.images.device):
                score_B = per_sample_loss(engine.module(batch.images), batch.labels, rule) - loss_B
            clock.end("score")
            kept = coordinate(score_B, rule.gamma, rule.scope, ranks)
            clock.end("select")
        # 3. The descent gradient at w + eps: the engine averages it over ranks.
        loss_D = per_sample_loss(engine(batch.images[kept.index_D]), batch.labels[kept.index_D], rule)
        engine.backward(loss_D.sum() * kept.weight)
        rise = (loss_D.detach() - loss_B[kept.index_D]) if score_B is None else score_B
    clock.end("descent")

    # 4. The update, at w.
    grad_norm = engine.step(lr)
    clock.end("update")
    num_kept = loss_B.new_tensor(float(len(kept.index_D)))
    return StepStats(loss_B.mean(), rise.mean(), num_kept, kept.threshold, 1.0 - eps.finite.float(), grad_norm)


class Kept(NamedTuple):
    """The samples of this rank's batch that the descent uses."""

    index_D: Tensor
    """Positions in the batch, ascending."""
    weight: float
    """Of each sample's loss: with it, the gradient averaged over ranks is the mean over all ranks' kept samples."""
    threshold: Tensor
    """The smallest score kept, over the samples that competed."""


def coordinate(score_B: Tensor, gamma: float, scope: str, ranks: Ranks) -> Kept:
    """Keep the share `gamma` with the largest scores, of each rank's batch or (`scope` global) of all ranks' batches.

    A global selection all-gathers the scores, four bytes a sample, and every rank derives the same answer from them.
    """
    if scope == "rank":
        kept_B = selection.select(score_B.unsqueeze(0), gamma)[0]
        num_kept = selection.num_kept(gamma, len(score_B))
        # A count known beforehand needs no word from the device.
        index_D = kept_B.byte().argsort(descending=True, stable=True)[:num_kept]
        return Kept(index_D, 1.0 / num_kept, selection.threshold(score_B, kept_B))
    score_WB = ranks.gather(score_B)
    kept_WB = selection.select(score_WB, gamma)
    kept_total = selection.num_kept(gamma, score_WB.numel(), at_least=ranks.world_size)
    index_D = kept_WB[ranks.rank].nonzero().squeeze(1)
    return Kept(index_D, ranks.world_size / kept_total, selection.threshold(score_WB, kept_WB))


def per_sample_loss(logits_BK: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Cross-entropy of each sample, [B]; `labels` are classes [B] or shares of classes [B, K]."""
    return F.cross_entropy(logits_BK.float(), labels, reduction="none", label_smoothing=rule.label_smoothing)


def seed_step(*names: int) -> torch.Generator:
    """Seed torch's own generators for one step, and return one more for the draws that are ours."""
    own, ours = np.random.SeedSequence(names).generate_state(2, np.uint64)
    torch.manual_seed(int(own))
    return torch.Generator().manual_seed(int(ours))


def _plain_step(engine: Engine, batch: Batch, rule: Rule, lr: float, clock: PhaseClock) -> StepStats:
    loss = per_sample_loss(engine(batch.images), batch.labels, rule).mean()
    engine.backward(loss)
    clock.end("descent")
    grad_norm = engine.step(lr)
    clock.end("update")
    loss = loss.detach()
    zero, num_kept = torch.zeros_like(loss), loss.new_tensor(float(len(batch.labels)))
    return StepStats(loss, zero, num_kept, loss.new_tensor(torch.nan), zero, grad_norm)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed(state: Tensor, device: torch.device) -> Iterator[None]:
    """Dropout and DropPath draw again what they drew after `state` was taken: else selection would rank noise."""
    set_state = torch.cuda.set_rng_state if device.type == "cuda" else torch.set_rng_state
    now = _random_state(device)
    set_state(state)
    try:
        yield
    finally:
        set_state(now)
