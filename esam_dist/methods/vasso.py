"""VaSSO (Li and Giannakis 2023, arXiv 2309.15639, equation 5). Cost: 2.00 of SGD, and one average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esam_dist.methods.directions import average
from esam_dist.methods.method import Remembering
from esam_dist.section import Real
from esam_dist.step import Step


class VaSSO(Remembering):
    """SAM along a moving average of gradients, which varies less from batch to batch than each does."""

    name: Literal["vasso"] = "vasso"
    theta: Annotated[Real, Field(gt=0.0, le=1.0)] = 0.9
    """Weight of the newest gradient in the average."""

    def __call__(self, step: Step) -> None:
        """Each rank adds its own gradient to the average of all."""
        with step.at(step.along(average(step, step.gradient(fill=True), self.theta), self.rho)):
            step.descend()
