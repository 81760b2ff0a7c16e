"""Recycled ESAM (ours): the ascent's gradient over the batch is used again in the descent, which is then unbiased.

Cost, SGD being 1: 1 + gamma, and f / 3 more for `score: forward`. `(1 - gamma) g(w) + gamma g_kept(w + eps)` contains
the mean over all samples at w, so that no sample is lost, and a few kept ones are enough to steer.
"""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.directions import Directed
from esam_dist.methods.method import Setup
from esam_dist.schedule import Schedule
from esam_dist.section import Faults, Share
from esam_dist.step import Step
from esam_dist.step.score import Score
from esam_dist.step.selection import num_kept


class Recycled(Directed):
    """All weights climb; the share `gamma` of the samples descends; the ascent's gradient stands in for the others."""

    name: Literal["recycled"] = "recycled"
    gamma: Share = Schedule.constant(0.25)
    """Share of the samples kept for the descent, in (0, 1]."""
    score: Score = "random"
    """What ranks them, as for `esam`."""
    exact: bool = False
    """Recycle g(w) of just the samples that are not kept (`score: random`, `scope: rank`), in passes of their own."""

    def __call__(self, step: Step) -> None:
        """The mean of the clean gradient and that of the kept samples at the perturbed weights, by their shares."""
        choice = self.choice(step)
        if self.exact and choice.num_within_rank < len(step.examples):
            # BatchNorm normalises each part by itself; its statistics move with the rest, the larger part.
            kept, rest = choice.split()
            recycled = step.gradient(of=rest, fill=True)
            share = len(kept) / len(step.examples)
            clean = recycled.lerp(step.gradient(of=kept, fill=True), share)
            recycled.clear_()
        else:
            recycled = clean = step.gradient(fill=self.direction != "gradient")
            # Where the exact form keeps every sample, there is nothing to recycle.
            share = 1.0 if self.exact else step.value(self.gamma)
        eps = step.along(self.climb(step, clean=clean), self.rho)
        with step.at(eps, keep=eps.direction is recycled):
            step.descend(choice, mixed=recycled, share=1.0 - share)
        self.settle(step)

    def needs(self) -> set[str]:
        """See `Method`."""
        return super().needs() | {"mix"}

    def faults(self, setup: Setup) -> Faults:
        """See `Method`."""
        size = self.group_size or setup.batch_size
        lone = self._lone_part(size)
        return [
            *super().faults(setup),
            (
                self.exact and (self.score != "random" or self.scope != "rank"),
                "method.exact = true chooses the samples before any pass: it needs method.score = random and "
                "method.scope = rank",
            ),
            (
                self.exact and lone > 0,
                "method.exact = true passes the samples kept and the rest apart, two or more in each: method.gamma = "
                f"{self.gamma.plain()} comes to keep {lone} of {size}; give another gamma (as a list it passes over "
                "values), larger batches, or exact = false",
            ),
        ]

    def _lone_part(self, size: int) -> int:
        """The number kept of `size` where these, or the rest, are a single sample; 0 where no gamma leads to that."""
        numbers = [num_kept(gamma, size) for gamma in self.gamma.values()]
        visited = range(min(numbers), max(numbers) + 1) if self.gamma.linear else numbers
        # A rest of none is fine: there is nothing to recycle then.
        return next((kept for kept in visited if kept < size and min(kept, size - kept) == 1), 0)
