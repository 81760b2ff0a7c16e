"""torch.compile, in a way that lets a backward pass still stop early."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch._dynamo
from torch import nn

from esam_dist.layers import blocks

Backend = str | Callable[..., Any]

log = logging.getLogger(__name__)

# A part is compiled for the batch, for scores without gradients, for the kept samples, and for validation.
_COMPILATIONS = 8


def compile_network(network: nn.Module, *, by_block: bool = False, backend: Backend = "inductor") -> None:
    """Compile `network` in place: as a whole, or each of its blocks by itself.

    What is compiled together has one backward pass, which computes the gradients of all its weights and of its input,
    whichever are asked for. So if the network is compiled as a whole, an ascent over some of the weights (SWP) costs as
    much as one over all. If it is compiled by blocks, an ascent that stops at a cut (`method.swp: suffix`) still leaves
    out every block before the cut.
    """
    parts = blocks(network) if by_block else []
    if by_block and not parts:
        log.warning(
            "train.compile: this network has no repeated blocks, so it is compiled as a whole, and the ascent costs "
            "what it would without method.swp = suffix"
        )
    parts = parts or [network]
    # Blocks of one class share their code. torch limits compilations per code object, and does not compile beyond.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _COMPILATIONS * len(parts))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    for part in parts:
        part.compile(backend=backend)
