"""SAM (Foret et al. 2021, arXiv 2010.01412, Algorithm 1). Cost: 2.00 of SGD."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.method import Sharp
from esam_dist.step import Step


class SAM(Sharp):
    """The gradient at `w + rho * g / ||g||`, with each rank's own g (m-sharpness)."""

    name: Literal["sam"] = "sam"

    def __call__(self, step: Step) -> None:
        """Climb along the gradient (equation 2), descend with the gradient taken there (equation 3)."""
        with step.at(step.along(step.gradient(), self.rho)):
            step.descend()
