"""LookSAM (Liu et al. 2022, arXiv 2203.02714, Algorithm 1). Cost: 1 + 1 / interval of SGD."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.method import Remembering, Setup
from esam_dist.section import Count, Faults, NonNegative
from esam_dist.step import Moment, Step
from esam_dist.step.vector import TINY


class LookSAM(Remembering):
    """SAM every k-th update; in between, the part of it that leads to flat regions is used again."""

    name: Literal["looksam"] = "looksam"
    interval: Count = 5
    """Every k-th update is perturbed, the others reuse its flat part."""
    alpha: NonNegative = 0.2
    """Weight of the reused part."""

    def is_sharp(self, moment: Moment) -> bool:
        """Also between two perturbations."""
        return super().is_sharp(moment._replace(update=0))

    def __call__(self, step: Step) -> None:
        """The flat part (equation 5) is the part of the perturbed gradient that is orthogonal to the clean one."""
        clean = step.gradient(fill=True)
        flat = step.state.recall("flat")
        if step.moment.update % self.interval and flat is not None:
            ratio = clean.dot(clean).sqrt() / flat.dot(flat).sqrt().clamp_min(TINY)
            step.average(clean + flat * (self.alpha * ratio))
            return
        with step.at(step.along(clean, self.rho), keep=True):
            sharp = step.gradient(clean)
        flat = sharp - clean * (clean.dot(sharp) / clean.dot(clean).clamp_min(TINY))
        # An overflow in float16 costs one update, not all until the next perturbation.
        step.state.remember("flat", step.mean_over_ranks(flat.clear_()))
        step.average(sharp)

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        return [
            *super().faults(setup),
            (
                self.interval == 1,
                "method.name = looksam reuses a direction between perturbations: give method.interval > 1, such as 5",
            ),
        ]
