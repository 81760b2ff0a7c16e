"""Data selection (SDS, section 3.3 of the ESAM paper): the keys of methods that descend with some of the samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from esam_dist.methods.method import Setup, Sharp
from esam_dist.schedule import Schedule
from esam_dist.section import Faults, NonNegative, Share
from esam_dist.step import Moment, Step
from esam_dist.step.choice import Choice, Sds
from esam_dist.step.score import Head, Score


class Selective(Sharp):
    """Keeps the share `gamma` of the samples, ranked by a score within a rank or over all of them."""

    gamma: Share = Schedule.constant(0.5)
    """SDS: share of the samples kept for the descent, in (0, 1]."""
    score: Score = "forward"
    """`forward`: the rise of each loss, measured at the perturbed weights; `head`: its first-order rise through the
    classifier, without a pass; `loss`: the largest losses; `random`: the control."""
    scope: Literal["rank", "global"] = "global"
    """Samples are ranked within each rank's batch, or over the batches of all ranks."""
    transport: Literal["scores", "thresholds"] = "scores"
    """For `scope: global`, what ranks exchange: every score (exact), or `num_quantiles` of their own."""
    num_quantiles: Annotated[int, Field(ge=2)] = 16
    """For `transport: thresholds`: quantiles that a rank sends."""
    capacity_factor: NonNegative = 0.0
    """For `scope: global`: a rank keeps at most this many times `gamma * batch`, in a batch of just that size, so that
    no rank is late and shapes are static; 0: no limit."""

    def choice(self, step: Step) -> Choice:
        """The selection of this step, as the keys say."""
        where = (self.scope, self.transport, self.num_quantiles, self.capacity_factor)
        return step.choice(Sds(step.value(self.gamma), self.score, *where))

    def values(self, moment: Moment) -> dict[str, float]:
        """See `Method`."""
        return super().values(moment) | {"gamma": self.gamma(moment.epoch)}

    def prepare(self, module: nn.Module) -> None:
        """See `Method`."""
        if self.score == "head":
            Head(module)

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        factor, within = self.capacity_factor, self.scope == "rank"
        return [
            *super().faults(setup),
            (
                self.transport == "thresholds" and within,
                "method.transport = thresholds exchanges them between ranks: it needs method.scope = global",
            ),
            (
                factor > 0.0 and within,
                "method.capacity_factor limits a rank's share of a global selection: it needs method.scope = global",
            ),
            (
                0.0 < factor < 1.0,
                f"method.capacity_factor = {factor:g} would keep fewer than gamma; give at least 1, or 0",
            ),
            (
                self.group_size > 0 and not within,
                "method.group_size selects within each group: it needs method.scope = rank",
            ),
        ]
