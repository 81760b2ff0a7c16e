"""The optimizer over all simulated ranks: SGD with momentum, Nesterov's or not, L2 on everything, clipping."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esam_dist.engine.keys import OptimKeys
from esam_dist.methods import Method
from esam_dist.randomness import seed_step
from tests.multiprocess.simulation.methods import METHODS, sgd
from tests.multiprocess.simulation.rank import Rank
from tests.multiprocess.simulation.weights import Weights, mean, norm, plus, times
from tests.multiprocess.simulation.world import World

MicroBatch = list[tuple[Tensor, Tensor]]
"""Images and labels of each rank."""


@dataclass
class Simulation:
    """What W ranks would have after each update."""

    network: nn.Module
    optim: OptimKeys
    method: Method
    label_smoothing: float = 0.0
    shared: bool = False
    """One perturbation for all ranks, along the averaged gradient (ZeRO 3)."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    decays: dict[str, float] = field(default_factory=dict)
    """By parameter, where they are not those of all."""
    velocity: Weights = field(default_factory=dict)
    memory: dict[str, Weights] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    """Of each micro-batch in which samples were selected: how many all ranks kept together."""

    def __post_init__(self) -> None:
        named = {name: param.detach().clone() for name, param in self.network.named_parameters()}
        self.weights = {name: named[name] for name, p in self.network.named_parameters() if p.requires_grad}
        # What is frozen is to a pass what a buffer is.
        frozen = {name: value for name, value in named.items() if name not in self.weights}
        self.buffers = {name: buffer.detach().clone() for name, buffer in self.network.named_buffers()} | frozen

    def update(self, micro_batches: list[MicroBatch], seed: int, step: int, epoch: float) -> None:
        """One update from `micro_batches[micro][rank]`."""
        grads = [self._gradient(batches, (seed, step, micro), epoch) for micro, batches in enumerate(micro_batches)]
        total = mean(grads)
        self.memory["previous"] = total
        factor = min(1.0, self.optim.clip_grad_norm / (norm(total) + 1e-6)) if self.optim.clip_grad_norm else 1.0
        decays = {name: self.decays.get(name, self.optim.weight_decay) for name in self.weights}
        step_ = plus(times(total, factor), {name: decays[name] * value for name, value in self.weights.items()})
        self.velocity = plus(step_, self.velocity, self.optim.momentum)
        if self.optim.nesterov:
            step_ = plus(step_, self.velocity, self.optim.momentum)
        moved = step_ if self.optim.nesterov else self.velocity
        moved = {name: self.lr_factors.get(name, 1.0) * value for name, value in moved.items()}
        self.weights = plus(self.weights, moved, -self.optim.lr)

    def _gradient(self, batches: MicroBatch, seed: tuple[int, ...], epoch: float) -> Weights:
        """The gradient of one micro-batch over all ranks; the statistics become the mean of what each rank's are."""
        ranks = [
            Rank(self.network, self.buffers, batch, seed_step(*seed, rank), self.label_smoothing)
            for rank, batch in enumerate(batches)
        ]
        update = seed[1]
        world = World(self.network, self.weights, ranks, update, epoch, self.velocity, self.memory, shared=self.shared)
        found = (METHODS[self.method.name] if self._is_on_turn(update) else sgd)(self.method, world)
        self.buffers = {
            name: torch.stack([rank.buffers[name].double() for rank in ranks]).mean(0).to(value.dtype)
            for name, value in self.buffers.items()
        }
        if world.num_kept:
            self.kept.append(sum(world.num_kept))
        return found

    def _is_on_turn(self, update: int) -> bool:
        """LookSAM is between two perturbations, too."""
        return self.method.name in ("sgd", "looksam") or update % self.method.interval == 0
