"""An update whose gradient is not finite is none: weights, momentum and counts stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def not_finite(grad_norm: Tensor) -> Tensor:
    """1 for the norm of a gradient that makes no update, 0 for all others; as optimizers take it, on the device."""
    return (~torch.isfinite(grad_norm)).float()


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, skipped: Tensor) -> Iterator[None]:
    """Inside the block, `optimizer.step` leaves all as it is where `skipped` is 1.

    A fused optimizer of torch looks at it on the device; for others the host does, and waits.
    """
    if not _takes_flag(optimizer):
        if bool(skipped):
            # All optimizers leave weights alone that have none. Left out, the step would be missed by a scheduler.
            optimizer.zero_grad(set_to_none=True)
        yield
        return
    _make_ready(optimizer)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as GradScaler says it
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _takes_flag(optimizer: torch.optim.Optimizer) -> bool:
    # By the name by which GradScaler asks. With dampening, SGD's first momentum has no other form than its first
    # gradient.
    damped = any(group.get("dampening") for group in optimizer.param_groups)
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and not damped


def _make_ready(optimizer: torch.optim.Optimizer) -> None:
    """What torch's fused SGD and AdamW take for granted: momentum, and gradients that lie in memory as weights do."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.stride() != param.stride():
                param.grad = torch.empty_like(param).copy_(param.grad)
            state = optimizer.state[param]
            # Else its first momentum is memory that an update which is skipped does not write to.
            if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param)
