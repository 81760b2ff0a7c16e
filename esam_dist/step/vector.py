"""A vector over some of the weights, such as a gradient, with the arithmetic in which papers write their methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30
"""Smallest divisor: 0 / 0 is 0 in the formulas of projections."""


@dataclass(frozen=True)
class Vector:
    """One tensor for each of `params`; two vectors in one formula are over the same ones.

    Where no rank holds the weights whole (ZeRO 3), the tensors are this rank's shards, and `over_shards` sums a scalar
    over ranks: so `dot` and `norm` are those of the whole vector everywhere.
    """

    params: list[nn.Parameter]
    tensors: list[Tensor]
    over_shards: Callable[[Tensor], Tensor] | None = None

    def __add__(self, other: Vector) -> Vector:
        return self._each(torch._foreach_add, other.tensors)

    def __sub__(self, other: Vector) -> Vector:
        return self._each(torch._foreach_sub, other.tensors)

    def __mul__(self, factor: float | Tensor) -> Vector:
        return self._each(torch._foreach_mul, factor)

    def lerp(self, other: Vector, share: float) -> Vector:
        """`self + share * (other - self)`."""
        return self._each(torch._foreach_lerp, other.tensors, share)

    def mul_(self, factor: list[Tensor]) -> Vector:
        """Multiplied elementwise, in place."""
        if self.tensors:
            torch._foreach_mul_(self.tensors, factor)
        return self

    def clear_(self) -> Vector:
        """What is not finite becomes 0, in place: 0 * nan is nan, so no factor of 0 could keep it from the weights."""
        for tensor in self.tensors:
            tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return self

    def dot(self, other: Vector) -> Tensor:
        """The inner product, a scalar on the device."""
        if not self.tensors:
            return torch.zeros(())
        products = torch._foreach_mul(self.tensors, other.tensors)
        total = torch.stack([product.sum() for product in products]).sum()
        return total if self.over_shards is None else self.over_shards(total)

    def norm(self) -> Tensor:
        """The L2 norm, a scalar on the device."""
        norm = torch.nn.utils.get_total_norm(self.tensors)
        return norm if self.over_shards is None else self.over_shards(norm.square()).sqrt()

    def _each(self, operation: Callable[..., Any], *arguments: Any) -> Vector:
        # Torch's operations on lists refuse an empty one, and a step may draw no weight that has a part in the pass.
        tensors = operation(self.tensors, *arguments) if self.tensors else ()
        return Vector(self.params, list(tensors), self.over_shards)


def owned(grads: list[Tensor | None]) -> list[Tensor | None]:
    """`grads`, each in memory of its own, to be written to.

    Autograd gives one tensor to two weights that are added, and one number, expanded, to weights that are summed.
    """
    taken: set[int] = set()
    own: list[Tensor | None] = []
    for grad in grads:
        if grad is None:
            own.append(None)
            continue
        shares = grad.data_ptr() in taken or 0 in grad.stride()
        own.append(grad.clone(memory_format=torch.contiguous_format) if shares else grad)
        taken.add(grad.data_ptr())
    return own
