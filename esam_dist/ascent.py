"""What a step does at the unperturbed weights: the forward pass, the ascent direction, and scores known from it.

Shapes: B samples per rank, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist import perturb, score, selection, swp
from esam_dist.batchnorm import frozen_batchnorm
from esam_dist.coordinate import Coordination
from esam_dist.data import Batch
from esam_dist.engine.base import Engine
from esam_dist.perturb import Perturbation
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule


class Ascent(NamedTuple):
    """What is known once the passes at the unperturbed weights are done."""

    loss_B: Tensor
    eps: Perturbation
    recycled: list[Tensor]
    """The gradient at w that `descent: recycled` mixes in, on the parameters of `eps`; empty: none."""
    recycled_share: float
    """Its weight: `1 - gamma`, or what share of the samples it is the mean of."""
    coordination: Coordination | None
    """Under way where the scores are known without the perturbed weights."""


def ascend(engine: Engine, batch: Batch, rule: Rule, generator: torch.Generator, ranks: Ranks) -> Ascent:
    """Forward at w, gradient of the drawn tensors, and the selection begun where it needs no perturbed weights."""
    drawn = swp.draw(engine.module, rule.swp, rule.beta, generator)
    exact = rule.descent == "recycled_exact"
    if exact and selection.num_kept(rule.gamma, len(batch.labels)) < len(batch.labels):
        return _ascend_in_parts(engine, batch, rule, drawn.params, generator, ranks)
    logits_BK, score_B = early_scores(engine, batch, rule, generator, engine.module)
    under_way = None if score_B is None else Coordination(score_B, rule, ranks)
    loss_B = per_sample_loss(logits_BK, batch.labels, rule)
    grads: tuple[Tensor | None, ...] = ()
    if drawn.params:
        # LookSAM's flat part is a list over all parameters, whichever a pass uses.
        grads = torch.autograd.grad(
            engine.scale(loss_B.mean()),
            drawn.params,
            allow_unused=True,
            materialize_grads=rule.descent == "looksam",
        )
    eps = _perturbation(drawn, grads, rule, generator, loss_B.device)
    return Ascent(loss_B.detach(), eps, [] if exact else eps.directions, 1.0 - rule.gamma, under_way)


def early_scores(
    engine: Engine,
    batch: Batch,
    rule: Rule,
    generator: torch.Generator,
    forward: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """`forward` of the batch at w, [B, K], and each sample's score [B] where that is known from it."""
    early = rule.score if rule.gamma < 1.0 else "none"
    random_B = torch.rand(len(batch.labels), generator=generator) if early == "random" else None
    head = score.watched_head(engine.module) if early == "head" else None
    logits_BK = forward(batch.images)
    score_B: Tensor | None = None
    if random_B is not None:
        score_B = random_B.to(logits_BK.device)
    elif early == "loss":
        score_B = per_sample_loss(logits_BK.detach(), batch.labels, rule)
    elif head is not None:
        targets_BK = score.targets_of(batch.labels, logits_BK.detach(), rule.label_smoothing)
        score_B = score.head_rise(logits_BK.detach(), targets_BK, score.head_input(head))
    return logits_BK, score_B


def _ascend_in_parts(
    engine: Engine,
    batch: Batch,
    rule: Rule,
    params: list[nn.Parameter],
    generator: torch.Generator,
    ranks: Ranks,
) -> Ascent:
    """The kept samples and the rest in passes of their own, so that only the rest's gradient is recycled.

    BatchNorm normalises each part by itself; its statistics move with the rest, the larger part.
    """
    random_B = torch.rand(len(batch.labels), generator=generator).to(batch.images.device)
    coordination = Coordination(random_B, rule, ranks)
    index_D, rest = coordination.split()
    parts, losses = [], []
    for index, frozen in ((rest, False), (index_D, True)):
        with frozen_batchnorm(engine.module) if frozen else nullcontext():
            loss = per_sample_loss(engine.module(batch.images[index]), batch.labels[index], rule)
        grads = torch.autograd.grad(engine.scale(loss.mean()), params, allow_unused=True, materialize_grads=True)
        parts.append(perturb.owned(grads))
        losses.append(loss.detach())
    loss_B = torch.cat(losses)[torch.cat([rest, index_D]).argsort()]
    share = len(index_D) / len(loss_B)
    whole = list(torch._foreach_lerp(parts[0], parts[1], share))
    perturb.clear(parts[0])
    return Ascent(loss_B, perturb.along(params, whole, rule.radius), parts[0], 1.0 - share, coordination)


def _perturbation(
    drawn: swp.Draw,
    grads: tuple[Tensor | None, ...],
    rule: Rule,
    generator: torch.Generator,
    device: torch.device,
) -> Perturbation:
    used = [(param, grad) for param, grad in zip(drawn.params, grads, strict=True) if grad is not None]
    if not used:
        return perturb.none(device)
    params, directions = [param for param, _ in used], perturb.owned([grad for _, grad in used])
    if drawn.factors is not None:
        factors = [f for f, grad in zip(drawn.factors, grads, strict=True) if grad is not None]
        torch._foreach_mul_(directions, factors)
    if drawn.keep_element < 1.0:
        swp.mask_elements(directions, drawn.keep_element, generator)
    if rule.adaptive_eta is not None:
        return perturb.along_adaptive(params, directions, rule.radius, rule.adaptive_eta)
    return perturb.along(params, directions, rule.radius)


def per_sample_loss(logits_BK: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Cross-entropy of each sample, [B]; `labels` are classes [B] or shares of classes [B, K]."""
    return F.cross_entropy(logits_BK, labels, reduction="none", label_smoothing=rule.label_smoothing)
