"""S2-SAM (Ji et al. 2024, single-step SAM), along the gradient of the update before; AsyncSAM with a delay of 1.

Cost: 1.00 of SGD, and a copy of the averaged gradient; under ZeRO one more all-reduce.
"""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.directions import keep_for_next, previous
from esam_dist.methods.method import Sharp
from esam_dist.step import Step


class S2SAM(Sharp):
    """SAM along the gradient of the sharpness-aware update before, taken at that one's weights; the first is plain."""

    name: Literal["s2sam"] = "s2sam"

    def __call__(self, step: Step) -> None:
        """One pass, at weights perturbed along the last update's averaged gradient: alike on all ranks."""
        with step.at(step.along(previous(step), self.rho)):
            step.descend()
        keep_for_next(step)

    def needs(self) -> set[str]:
        """See `Method`."""
        return super().needs() | {"memory"}
