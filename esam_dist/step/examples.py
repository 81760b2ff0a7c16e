"""What a step trains on: inputs and targets of any structure, and the loss of each sample.

Shapes: B samples per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esam_dist.errors import UserError

Tree = Any
"""A tensor, or a tuple, list or dict of trees; the samples lie in dimension 0 of every tensor."""
Loss = Callable[[Any, Tree], Tensor]
"""From the network's outputs and the targets to one loss per sample, [B]."""
Index = Tensor | slice


@dataclass(frozen=True)
class Examples:
    """The samples of one micro-batch, or some of them."""

    inputs: Tree
    targets: Tree
    loss_fn: Loss

    def __len__(self) -> int:
        return len(first_tensor(self.inputs))

    def __getitem__(self, index: Index) -> Examples:
        """The samples at positions `index`."""
        return Examples(_take(self.inputs, index), _take(self.targets, index), self.loss_fn)

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return first_tensor(self.inputs).device

    def losses(self, outputs: Any) -> Tensor:
        """The loss of each sample, [B]. Raises UserError for a loss of another shape."""
        loss_B = self.loss_fn(outputs, self.targets)
        if loss_B.shape != (len(self),):
            raise UserError(
                f"loss_fn returned a tensor of shape {list(loss_B.shape)} for {len(self)} samples: it must return one "
                'loss per sample, such as F.cross_entropy(outputs, targets, reduction="none")'
            )
        return loss_B


def call(module: nn.Module | Callable[..., Any], inputs: Tree) -> Any:
    """`module` of `inputs`: a tuple holds its arguments, a dict its keyword arguments, all else is the one argument."""
    if isinstance(inputs, tuple):
        return module(*inputs)
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def first_tensor(tree: Tree) -> Tensor:
    """The first tensor of a tree. Raises UserError where there is none."""
    if isinstance(tree, Tensor):
        return tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ():
        if not isinstance(child, Tensor | tuple | list | dict):
            continue
        return first_tensor(child)
    raise UserError(f"inputs of type {type(tree).__name__}: give a tensor, or a tuple, list or dict that holds tensors")


def _take(tree: Tree, index: Index) -> Tree:
    """The tree with each tensor's samples at `index`; what is no tensor (None, a flag) stays."""
    if isinstance(tree, Tensor):
        return tree[index]
    if isinstance(tree, dict):
        return {key: _take(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        children = [_take(value, index) for value in tree]
        # A named tuple takes its fields one by one.
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return tree
