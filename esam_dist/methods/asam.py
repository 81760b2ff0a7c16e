"""ASAM (Kwon et al. 2021, arXiv 2102.11600, equation 7 and Algorithm 1). Cost: 2.00 of SGD."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from esam_dist.methods.method import Sharp
from esam_dist.section import NonNegative
from esam_dist.step import Step
from esam_dist.step.vector import Vector


class ASAM(Sharp):
    """SAM in a ball measured in units of each weight's own size: rescaling a layer does not change it."""

    name: Literal["asam"] = "asam"
    eta: NonNegative = 0.01
    """Added to a weight's size."""

    def __call__(self, step: Step) -> None:
        """`eps = rho * T^2 g / ||T g||` with `T = |w| + eta`."""
        clean = step.gradient()
        norm = _times_size_squared(clean, step.engine.weights(clean.params), self.eta)
        with step.at(step.along(clean, self.rho, norm)):
            step.descend()


def _times_size_squared(g: Vector, weights: list[Tensor], eta: float) -> Tensor:
    """Make `g` into `T^2 g`, in place; returns `||T g||`."""
    T = list(torch._foreach_abs(weights))
    torch._foreach_add_(T, eta)
    norm = g.mul_(T).norm()
    g.mul_(T)
    return norm
