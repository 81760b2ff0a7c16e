"""MSAM (Becker et al. 2024, arXiv 2401.12033, Algorithm 1). Cost: 1.00 of SGD, and a copy of the momentum."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.directions import reversed_momentum
from esam_dist.methods.method import Setup, Sharp
from esam_dist.schedule import Schedule
from esam_dist.section import Faults, Radius
from esam_dist.step import Step


class MSAM(Sharp):
    """SAM along the optimizer's momentum, which is there already: `eps = -rho * v / ||v||`.

    Between steps the weights are the unperturbed ones, so these are evaluated, averaged and saved.
    """

    name: Literal["msam"] = "msam"
    rho: Radius = Schedule.constant(0.5)
    """Radius of the perturbation (L2 norm); about ten times SAM's (3 on a WideResNet in the paper), and not tied to the
    learning rate."""

    def __call__(self, step: Step) -> None:
        """The gradient at the weights that lie back along the momentum."""
        with step.at(step.along(reversed_momentum(step), self.rho)):
            step.descend()

    def needs(self) -> set[str]:
        """See `Method`."""
        return super().needs() | {"momentum"}

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        return [
            *super().faults(setup),
            (
                setup.momentum == 0.0,
                "method.name = msam perturbs along the momentum: give optim.momentum > 0",
            ),
        ]
