"""Where the ascent goes: every direction, and the keys with which a method that selects samples takes any of them.

gradient   of the batch (SAM)
momentum   the optimizer's, reversed: no pass (MSAM)
previous   the gradient of the update before: no pass (S2-SAM; AsyncSAM with a delay of 1); with an `interval`, of the
           sharpness-aware one before
average    the moving average of the batches' gradients (VaSSO)
residual   what the batch's gradient has beyond that average (F-SAM)

A moving average is of all ranks' gradients, and the same on every rank; what ranks exchange for it travels behind the
passes that follow.
"""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.method import Setup
from esam_dist.methods.selective import Selective
from esam_dist.section import BelowOne, Faults, NonNegative
from esam_dist.step import Step
from esam_dist.step.swp import Draw, compensated
from esam_dist.step.vector import Vector

Direction = Literal["gradient", "momentum", "previous", "average", "residual"]


def reversed_momentum(step: Step, drawn: Draw | None = None) -> Vector:
    """`-v`: back to where the weights have come from, which is uphill (MSAM, arXiv 2401.12033)."""
    return step.momentum(drawn) * -1.0


def previous(step: Step, drawn: Draw | None = None) -> Vector:
    """The averaged gradient of the latest sharpness-aware update, empty before there was one.

    `keep_for_next` remembers it; plain updates, of an `interval` or outside the `phase`, read no gradient.
    """
    before = step.state.recall("previous")
    if before is None:
        return Vector([], [])
    of_param = dict(zip(before.params, before.tensors, strict=True))
    params = (drawn or step.draw()).params
    return Vector(params, [of_param[param].clone() for param in params])


def keep_for_next(step: Step) -> None:
    """After the descent: remember its averaged gradient, for `previous`."""
    gradient = step.averaged()
    if gradient is not None:
        step.state.remember("previous", gradient.clear_())


def average(step: Step, clean: Vector, theta: float) -> Vector:
    """`d = (1 - theta) d + theta g` (VaSSO, arXiv 2309.15639, equation 5); the first d is g."""
    before = _average_before(step, clean, 1.0 - theta)
    return clean if before is None else before.lerp(clean, theta)


def residual(step: Step, clean: Vector, sigma: float, decay: float) -> Vector:
    """`g - sigma * m`, with m as it was before this step (F-SAM, arXiv 2403.12350, and its released code)."""
    before = _average_before(step, clean, decay)
    return clean if before is None else clean - before * sigma


def _average_before(step: Step, clean: Vector, decay: float) -> Vector | None:
    """The moving average before this step; behind it, `m = decay * m + (1 - decay) * g` over all ranks."""
    before = step.state.recall("average")

    def move(mean: Vector) -> None:
        # What is not finite costs one step, not all that follow.
        mean.clear_()
        step.state.remember("average", mean if before is None else before.lerp(mean, 1.0 - decay))

    step.averaged_later(clean, move)
    return before


class Directed(Selective):
    """A method with data selection that may climb along any direction."""

    direction: Direction = "gradient"
    """Where the ascent goes: the batch's `gradient`; the optimizer's `momentum` reversed, or the gradient of the
    `previous` sharpness-aware update, which cost no pass; the moving `average` of gradients; or the `residual` of the
    gradient beside it."""
    decay: BelowOne = 0.6
    """For `direction: average | residual`: the share of the moving average that an update keeps."""
    sigma: NonNegative = 1.0
    """For `direction: residual`: how much of the average is subtracted."""

    def climb(self, step: Step, drawn: Draw | None = None, clean: Vector | None = None) -> Vector:
        """The ascent's direction over the drawn weights; `clean`: the batch's gradient, where it is known already."""
        if self.direction in ("momentum", "previous"):
            step.look()
            found = (reversed_momentum if self.direction == "momentum" else previous)(step, drawn)
            return found if drawn is None else compensated(found, drawn, step.generator)
        clean = clean or step.gradient(drawn, fill=self.direction != "gradient")
        if self.direction == "average":
            return average(step, clean, 1.0 - self.decay)
        return residual(step, clean, self.sigma, self.decay) if self.direction == "residual" else clean

    def settle(self, step: Step) -> None:
        """After the descent, at the unperturbed weights."""
        if self.direction == "previous":
            keep_for_next(step)

    def needs(self) -> set[str]:
        """See `Method`."""
        needed = {"momentum": {"momentum"}, "gradient": set()}.get(self.direction, {"memory"})
        return super().needs() | needed

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        averaged = self.direction in ("average", "residual")
        return [
            *super().faults(setup),
            (
                self.direction == "momentum" and setup.momentum == 0.0,
                "method.direction = momentum needs optim.momentum > 0",
            ),
            (
                averaged and (setup.accumulate > 1 or self.group_size > 0),
                f"method.direction = {self.direction} moves its average once per update: it needs train.accumulate = 1 "
                "and method.group_size = 0",
            ),
        ]
