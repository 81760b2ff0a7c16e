"""ESAM (Du et al. 2022, arXiv 2110.03141, Algorithm 1), its selection coordinated over ranks.

Cost, SGD being 1: (2 + beta + f + 3 gamma) / 3, with f = 1 for `score: forward`, else 0. At beta = gamma = 0.5 that is
1.67 as released, and 1.33 with `score: head`. With a direction that needs no pass and `score: random` it is gamma.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from esam_dist.errors import UserError
from esam_dist.methods.directions import Directed
from esam_dist.methods.method import Setup
from esam_dist.schedule import Schedule
from esam_dist.section import Faults, Share
from esam_dist.step import Moment, Step
from esam_dist.step import swp as weights
from esam_dist.step.perturbation import radius


class ESAM(Directed):
    """A share `beta` of the weights climbs (SWP), the share `gamma` of the samples descends (SDS)."""

    name: Literal["esam"] = "esam"
    beta: Share = Schedule.constant(0.5)
    """SWP: expected share of the weights that a step perturbs, in (0, 1]."""
    swp: weights.Mode = "tensor"
    """`tensor`: whole tensors are drawn; `element`: single weights (the paper's mask); `suffix`: the layers behind a
    random cut, where the ascent's backward pass stops; `norm`: only normalisation layers (SAM-ON)."""
    swp_scale: Literal["none", "paper", "released"] = "none"
    """Norm of the perturbation: `rho`; `rho / sqrt(beta)`; or `rho / beta`, as in the authors' code."""

    def __call__(self, step: Step) -> None:
        """Climb with the drawn weights; choose the samples whose loss rises most; descend with these."""
        beta = 1.0 if self.swp == "norm" else step.value(self.beta)
        drawn = step.draw(self.swp, beta)
        choice = self.choice(step)
        with step.at(step.along(self.climb(step, drawn), radius(step.value(self.rho), beta, self.swp_scale))):
            step.descend(choice)
        self.settle(step)

    def values(self, moment: Moment) -> dict[str, float]:
        """See `Method`."""
        return super().values(moment) | {"beta": self.beta(moment.epoch)}

    def needs(self) -> set[str]:
        """See `Method`."""
        return super().needs() | (set() if self._climbs_whole else {"part"})

    def prepare(self, module: nn.Module) -> None:
        """See `Method`."""
        super().prepare(module)
        if self.swp == "norm" and not weights.has_norms(module):
            raise UserError(
                "method.swp = norm perturbs normalisation layers, and this network has none; use method.swp = tensor"
            )

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        return [
            *super().faults(setup),
            (
                self.direction in ("average", "residual") and not self._climbs_whole,
                f"method.direction = {self.direction} averages the gradient of all weights: it needs method.beta = 1 "
                "and method.swp = tensor",
            ),
        ]

    @property
    def stops_early(self) -> bool:
        """See `Method`."""
        return self.swp == "suffix"

    @property
    def _climbs_whole(self) -> bool:
        return self.swp == "tensor" and set(self.beta.values()) == {1.0}
