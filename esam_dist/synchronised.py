"""The step under ZeRO 3: SAM and SDS with one perturbation for all ranks, along the averaged gradient.

Nobody holds the weights whole, so nobody can perturb them with a gradient of its own. Shapes as in `esam`.
"""

from __future__ import annotations

import torch

from esam_dist.ascent import early_scores, per_sample_loss
from esam_dist.batchnorm import frozen_batchnorm
from esam_dist.clock import PhaseClock
from esam_dist.coordinate import Coordination, keep_all
from esam_dist.data import Batch
from esam_dist.engine.zero3 import Zero3Engine
from esam_dist.esam import StepStats
from esam_dist.randomness import Randomness, seed_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule


def synchronised_step(
    engine: Zero3Engine, batch: Batch, rule: Rule, *, lr: float, ranks: Ranks, seed: tuple[int, ...], clock: PhaseClock
) -> StepStats:
    """As `esam.esam_step`, with two averaged backward passes instead of one; the second is the one that updates."""
    generator = seed_step(*seed)
    before = Randomness.now(batch.images.device)
    logits_BK, scores = early_scores(engine, batch, rule, generator, engine)
    coordination = None if scores is None else Coordination(scores, rule, ranks)
    loss_B = per_sample_loss(logits_BK, batch.labels, rule)
    engine.backward(loss_B.mean())
    loss_B = loss_B.detach()
    clock.end("ascent")
    with frozen_batchnorm(engine.module), engine.perturbed_by_average(rule.radius) as finite:
        kept, rise_B = keep_all(loss_B), None
        if rule.gamma < 1.0:
            if coordination is None:
                with torch.no_grad(), before.replayed():
                    rise_B = per_sample_loss(engine.module(batch.images), batch.labels, rule) - loss_B
                clock.end("score")
                coordination = Coordination(rise_B, rule, ranks)
            kept = coordination.end()
            clock.end("select")
        loss_D = per_sample_loss(engine(batch.images[kept.index_D]), batch.labels[kept.index_D], rule)
        engine.backward(kept.mean_over_ranks(loss_D))
        rise = loss_D.detach() - loss_B[kept.index_D] if rise_B is None else rise_B
    clock.end("descent")
    grad_norm = engine.step(lr)
    clock.end("update")
    return StepStats(loss_B.mean(), rise.mean(), kept.num_kept, kept.threshold, (~finite).float(), grad_norm)
