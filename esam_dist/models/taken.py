"""Weights of somewhere else in a network: what is taken, what is left there, what is made anew here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Size, nn

from esam_dist.errors import UserError
from esam_dist.layers import head
from esam_dist.models.weights import Weights
from esam_dist.soundness import not_finite

# Heads that only train, which we build no network with; and what newer versions compute for themselves.
LEFT = re.compile(r"(aux[12]|AuxLogits|head_dist)\.|.*\b(num_batches_tracked|relative_position_index|attn_mask)$")
_MISFIT = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


class Taken(NamedTuple):
    """What became of weights."""

    num_taken: int
    num_wanted: int
    left: dict[str, Size]
    """Those that the network has no place for, with their shapes."""
    anew: dict[str, Size]
    """Those of the network that are as they were initialised."""

    def __str__(self) -> str:
        parts = [f"{self.num_taken} of {self.num_wanted} tensors taken"]
        parts += [f"left: {_listed(self.left)}"] if self.left else []
        parts += [f"missing, and made anew: {_listed(self.anew)}"] if self.anew else []
        return "; ".join(parts)


def take(network: nn.Module, weights: Weights, source: str, name: str) -> Taken:
    """Copy `weights` into `network`, which `model.name = name` is. A classifier of other classes stays as it is.

    Raises UserError, naming the first key and both shapes, where anything else does not fit.
    """
    bad = not_finite(weights)
    if bad is not None:
        raise UserError(f"{source}: {bad} is not finite; give other weights")
    own, top = network.state_dict(), f"{head(network)[0]}."
    theirs = {key: value for key, value in weights.items() if key.startswith(top)}
    mine = {key: value for key, value in own.items() if key.startswith(top)}
    shapes = {key: value.shape for key, value in theirs.items()}
    # As many inputs, or none at all: a backbone.
    related = all(key not in mine or mine[key].shape[1:] == shape[1:] for key, shape in shapes.items())
    same = shapes == {key: value.shape for key, value in mine.items()}
    rest = weights if same or not related else {key: value for key, value in weights.items() if key not in theirs}
    fit = f"does not fit model.name = {name}"
    remedy = "set model.name to the network that the weights are of"
    try:
        missing, unexpected = network.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        misfit = _MISFIT.search(str(error))
        if misfit is None:
            raise
        key, there, here = misfit.groups()
        raise UserError(f"{source}: {fit}: {key} has shape {there} there and {here} here; {remedy}") from None
    anew = {key: own[key].shape for key in missing if not key.endswith("num_batches_tracked")}
    for key, shape in anew.items():
        if key not in mine:
            raise UserError(f"{source}: {fit}: {key}, of shape {list(shape)} here, is missing there; {remedy}")
    for key in unexpected:
        if not LEFT.match(key):
            shape = f", of shape {list(rest[key].shape)} there," if key in rest else ""
            raise UserError(f"{source}: {fit}: {key}{shape} is not in it; {remedy}")
    left = {key: weights[key].shape for key in weights if key in unexpected or key not in rest}
    return Taken(len(own) - len(missing), len(own), left, anew)


def _listed(tensors: dict[str, Size]) -> str:
    shown = [f"{name} {list(shape)}" for name, shape in _first(tensors.items())]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _first(items: Iterable[tuple[str, torch.Size]]) -> list[tuple[str, torch.Size]]:
    return list(items)[:4]
