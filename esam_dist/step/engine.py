"""What a step needs of whoever averages gradients over ranks and updates weights: DDP, DeepSpeed, or one process.

An update spans several micro-batches, which the engine counts: call `step` once for each, after `backward` or
`average`. With the last one, the gradient is averaged over ranks and the weights move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from esam_dist.step.examples import Tree, call
from esam_dist.step.perturbation import Perturbation, perturbed
from esam_dist.step.vector import Vector, owned


class Engine(ABC):
    """One replica of the model in training.

    What has a body here serves every engine whose ranks hold the weights whole.
    """

    module: nn.Module
    """The bare model: what is perturbed and evaluated. Calling it communicates nothing, but see `calls_together`."""
    calls_together = False
    """Whether a forward pass is a collective, so that all ranks must make the same number of them."""

    @property
    @abstractmethod
    def ends_update(self) -> bool:
        """Whether the micro-batch under way is the last of its update."""

    @abstractmethod
    def __call__(self, inputs: Tree) -> Any:
        """The model's outputs, for a loss that is given to `backward`: that pass is averaged over ranks."""

    @abstractmethod
    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the factor that keeps float16 gradients from vanishing; in other types, `loss` itself.

        It is the factor of `backward`, with the share of a micro-batch in its update. So a gradient that is taken
        without the engine overflows where one taken by it would, and not long before.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss`, averaged over ranks, to the update under way."""

    @abstractmethod
    def average(self, gradient: Vector) -> None:
        """Add a gradient that each rank has computed by itself, averaged over ranks, to the update under way."""

    @abstractmethod
    def step(self, lr: float | None) -> Tensor:
        """End the micro-batch; after the last of an update: clip, update at rate `lr` (None: the optimizer's), clear.

        Returns the norm of the averaged gradient before clipping, a scalar on the device; nan where no update ended.
        Where it is not finite, weights and optimizer state are left as they are, on all ranks alike.
        """

    @abstractmethod
    def momentum(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Copies of the optimizer's momentum (AdamW: first moment) of `params`, whole; zero before the first update.

        Called by all ranks together, each with `params` of its own; under ZeRO it costs one all-reduce of every weight.
        """

    @abstractmethod
    def averaged(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Copies of the averaged gradient of `params`, whole, after the last `backward` of an update, before `step`.

        Called by all ranks together, each with `params` of its own; under ZeRO it costs one all-reduce of every weight.
        """

    @abstractmethod
    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Copies of weights and optimizer state on the CPU, whole, by parameter name: alike for every engine and world
        size, and untouched by later updates.

        Called by all ranks together. One that shall not `keep` them takes part, a tensor at a time, and gets {}.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` of any engine returned. Called by all ranks together."""

    def outputs(self, inputs: Tree) -> Any:
        """The model's outputs, for `gradient`: by the bare module, so that no hook fires and nothing is sent."""
        return call(self.module, inputs)

    def look(self, inputs: Tree) -> Any:
        """The model's outputs, where no gradient is taken."""
        return call(self.module, inputs)

    def gradient(self, loss: Tensor, params: list[nn.Parameter], *, fill: bool = False) -> Vector:
        """The gradient of the scalar `loss` of `outputs` over those of `params` that it depends on.

        `fill`: over all of them, with zeros for the others. The gradient is this rank's own, in memory of its own.
        """
        if not params:
            return Vector([], [])
        grads = owned(list(torch.autograd.grad(self.scale(loss), params, allow_unused=True, materialize_grads=fill)))
        used = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
        found = Vector([param for param, _ in used], [grad for _, grad in used])
        one = torch.ones((), device=loss.device)
        scale = self.scale(one)
        if scale is not one and found.tensors:
            torch._foreach_mul_(found.tensors, one / scale)
        return found

    def weights(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The weights that belong to the tensors of a `gradient` over `params`, to be written to."""
        return [param.detach() for param in params]

    def at(self, perturbation: Perturbation, *, keep: bool) -> AbstractContextManager[None]:
        """`perturbation.perturbed` of these weights."""
        return perturbed(self.weights(perturbation.direction.params), perturbation, keep=keep)


class Injection(torch.autograd.Function):
    """A scalar of value 0 whose gradient with respect to `params` is given: no arithmetic, no pass.

    `Injection.apply(grads, *params)`; a term of a loss like any other.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *params: Tensor) -> Tensor:
        """The value 0."""
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The given gradients, times the gradient of what the scalar became part of."""
        return (None, *torch._foreach_mul(ctx.grads, outer[0]))


def inject(gradient: Vector) -> Tensor:
    """A term of the loss that adds `gradient` to the gradients of its parameters."""
    term: Tensor = Injection.apply(gradient.tensors, *gradient.params)
    return term
