"""All replicas in one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from tests.multiprocess.simulation.rank import Rank
from tests.multiprocess.simulation.weights import Weights, mean, plus


@dataclass
class World:
    """What a method finds when a micro-batch begins, alike on all ranks but for their batches."""

    network: nn.Module
    weights: Weights
    ranks: list[Rank]
    update: int
    epoch: float
    velocity: Weights
    memory: dict[str, Weights]
    """What methods remember from update to update."""
    shared: bool
    """One perturbation for all ranks, along the averaged gradient (ZeRO 3)."""
    num_kept: list[int] = field(default_factory=list)
    """How many samples each rank's descent uses, where samples are selected."""

    def at(self, eps: Weights) -> Weights:
        return plus(self.weights, eps)

    def clean(self, index: list[list[int]] | None = None) -> list[Weights]:
        """Each rank's gradient at w, of all its samples or of those at `index`; where it is shared, their mean."""
        parts = index or [None] * len(self.ranks)
        return self._shared(
            [rank.gradient(self.weights, i, is_clean=True) for rank, i in zip(self.ranks, parts, strict=True)]
        )

    def sharp(self, eps: list[Weights]) -> list[Weights]:
        """Likewise each at its own `w + eps`, of all samples."""
        return self._shared([rank.gradient(self.at(e)) for rank, e in zip(self.ranks, eps, strict=True)])

    def _shared(self, grads: list[Weights]) -> list[Weights]:
        return [mean(grads)] * len(grads) if self.shared else grads
