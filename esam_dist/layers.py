"""What a network consists of: the names of its weights, its classifier, its blocks, and how deep each weight lies."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from esam_dist.errors import UserError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NETWORK = "network."
"""Under this name a network lies in the module that is trained (`models.Classifier`)."""


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network, bare or in a `Classifier`, by the name that they have in the bare one."""
    return {name.removeprefix(NETWORK): param for name, param in module.named_parameters()}


def head(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and layer of the classifier: the last one that has parameters."""
    own = [
        (name, child)
        for name, child in module.named_modules()
        if next(child.parameters(recurse=False), None) is not None
    ]
    name, layer = own[-1]
    return name.removeprefix(NETWORK), layer


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost members of `network`'s sequences with at least two layers: residual blocks, encoder layers."""
    found: list[nn.Module] = []
    _collect(network, found)
    return found


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in module.children():
        member = isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS)
        if member and sum(param.ndim > 1 for param in child.parameters()) > 1:
            found.append(child)
        else:
            _collect(child, found)


def depths(module: nn.Module) -> dict[str, int]:
    """The layer in which each parameter lies, by name: 0 is the stem, the highest number the classifier.

    Each block is a layer; where a network has none, each convolution or linear layer. What stands between two of them,
    such as a downsampling, or behind the last, such as a normalisation, belongs to the one before: as timm groups it.
    """
    last = head(module)[1]
    parts = blocks(module) or [child for child in module.modules() if child is not last and _is_weighted(child)]
    number = {param: place for place, part in enumerate(parts, 1) for param in part.parameters()}
    top = set(last.parameters())
    found, current = {}, 0
    for name, param in named_weights(module).items():
        current = current if param in top else number.get(param, current)
        found[name] = len(parts) + 1 if param in top else current
    # Without a stem before the first part, that is the first layer.
    order = {depth: place for place, depth in enumerate(sorted(set(found.values())))}
    return {name: order[depth] for name, depth in found.items()}


def _is_weighted(child: nn.Module) -> bool:
    return any(param.ndim > 1 for param in child.parameters(recurse=False))


def matching(names: Iterable[str], pattern: str, key: str) -> list[str]:
    """Those of `names` that fit `pattern`, a shell's (`layer1.*`). Raises UserError, naming `key`, where none does."""
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if found:
        return found
    inside = any(name.startswith(f"{pattern}.") for name in names)
    near = [f"{pattern}.*"] if inside else difflib.get_close_matches(pattern, names, n=2, cutoff=0.0)
    raise UserError(f"{key}: {pattern!r} fits no parameter of the network; give a pattern such as {' or '.join(near)}")
