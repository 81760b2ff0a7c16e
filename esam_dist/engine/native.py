"""The engine of plain PyTorch: one process, or DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist.engine.state import load_by_name, momentum_of, state_by_name
from esam_dist.ranks import Ranks


class NativeEngine:
    """See `engine.base.Engine`. `clip_grad_norm` of 0 does not clip; `fp16` scales the loss."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        accumulate: int = 1,
        clip_grad_norm: float = 0.0,
        fp16: bool = False,
    ) -> None:
        self.module = module
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._clip_grad_norm = clip_grad_norm
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        self._ended = 0
        self._no_norm = torch.tensor(torch.nan, device=ranks.device)
        self._ddp: DistributedDataParallel | None = None
        if ranks.world_size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Buffers are averaged after the update (Ranks.average_buffers), not copied from rank 0 before it.
            # From torch 2.15 on the argument has another name.
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {unsynced: False}
            self._ddp = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **options)

    def __call__(self, images: Tensor | Callable[[], Tensor]) -> Tensor:
        """See `Engine`."""
        if self._ddp is None:
            return self.module(images)  # type: ignore[no-any-return]
        is_last = self._ended == self._accumulate - 1
        # DDP reads the flag in forward: that decides whether the backward will communicate.
        with nullcontext() if is_last else self._ddp.no_sync():
            return self._ddp(images)  # type: ignore[no-any-return]

    def scale(self, loss: Tensor) -> Tensor:
        """See `Engine`."""
        return self._scaler.scale(loss / self._accumulate) if self._scaler.is_enabled() else loss

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        torch.autograd.backward(self._scaler.scale(loss / self._accumulate))

    def step(self, lr: float) -> Tensor:
        """See `Engine`."""
        self._ended += 1
        if self._ended < self._accumulate:
            return self._no_norm
        self._ended = 0
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        params = [param for param in self.module.parameters() if param.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if self._clip_grad_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(params, self._clip_grad_norm, grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def momentum(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`."""
        return momentum_of(self._optimizer, params)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        return state_by_name(self.module, self._optimizer) | {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        load_by_name(self.module, self._optimizer, state)
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
