"""GSAM (Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1). Cost: 2.00 of SGD, and memory for two more gradients."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.method import Sharp
from esam_dist.section import NonNegative
from esam_dist.step import Step
from esam_dist.step.vector import TINY


class GSAM(Sharp):
    """Minimises the perturbed loss and its gap to the loss."""

    name: Literal["gsam"] = "gsam"
    alpha: NonNegative = 0.2
    """Weight of the part of the clean gradient that is orthogonal to the perturbed one."""

    def __call__(self, step: Step) -> None:
        """The perturbed gradient, less `alpha` times the orthogonal part of the clean one."""
        clean = step.gradient()
        with step.at(step.along(clean, self.rho), keep=True):
            sharp = step.gradient(clean)
        orthogonal = clean - sharp * (clean.dot(sharp) / sharp.dot(sharp).clamp_min(TINY))
        step.average(sharp - orthogonal * self.alpha)
