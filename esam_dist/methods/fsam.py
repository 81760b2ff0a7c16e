"""F-SAM (Li et al. 2024, arXiv 2403.12350, Algorithm 1, and its released code). Cost: 2.00 of SGD, and one average."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.directions import residual
from esam_dist.methods.method import Remembering
from esam_dist.section import BelowOne, NonNegative
from esam_dist.step import Step


class FSAM(Remembering):
    """SAM along what the batch's gradient has beyond the moving average of gradients: its noise, not its trend."""

    name: Literal["fsam"] = "fsam"
    sigma: NonNegative = 1.0
    """How much of the average is subtracted."""
    decay: BelowOne = 0.6
    """The share of the average that an update keeps: lambda in the paper, 0.6 or 0.9 there."""

    def __call__(self, step: Step) -> None:
        """The average is taken as it was before this step; the first step, without one, is SAM's."""
        clean = step.gradient(fill=True)
        with step.at(step.along(residual(step, clean, self.sigma, self.decay), self.rho)):
            step.descend()
