"""The engine of plain PyTorch: one process, or DistributedDataParallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist.engine.guard import not_finite, skipping
from esam_dist.engine.replicas import Replicas
from esam_dist.engine.state import load_by_name, momentum_of, state_by_name
from esam_dist.ranks import Ranks
from esam_dist.step.engine import Engine
from esam_dist.step.examples import Tree, call
from esam_dist.step.vector import Vector


@dataclass(frozen=True)
class UpdateOptions:
    """How an engine makes an update of what the micro-batches gave."""

    accumulate: int = 1
    """Micro-batches per update."""
    clip_grad_norm: float = 0.0
    """Largest global gradient norm; 0: no clipping."""
    scaler: torch.amp.GradScaler | None = None
    """For float16; stepped and updated by the engine."""


class NativeEngine(Engine):
    """See `step.Engine`. `module` is the bare network or, with several ranks, may be one that DDP has wrapped."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, options: UpdateOptions | None = None
    ) -> None:
        options = options or UpdateOptions()
        is_spread = ranks.world_size > 1 or isinstance(module, DistributedDataParallel)
        self._replicas = Replicas(module, ranks) if is_spread else None
        self.module = module if self._replicas is None else self._replicas.module
        self._optimizer, self._ranks, self._options = optimizer, ranks, options
        self.accumulate = options.accumulate
        """May be set anew between two updates."""
        self._scaler = options.scaler or torch.amp.GradScaler(ranks.device.type, enabled=False)
        self._ended = 0
        self._no_norm = torch.tensor(torch.nan, device=ranks.device)

    @property
    def ends_update(self) -> bool:
        """See `Engine`."""
        return self._ended == self.accumulate - 1

    def __call__(self, inputs: Tree) -> Any:
        """See `Engine`."""
        return (
            call(self.module, inputs) if self._replicas is None else self._replicas(inputs, averages=self.ends_update)
        )

    def scale(self, loss: Tensor) -> Tensor:
        """See `Engine`."""
        return self._scaler.scale(loss / self.accumulate) if self._scaler.is_enabled() else loss

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        backward = torch.autograd.backward if self._replicas is None else self._replicas.backward
        backward(self._scaler.scale(loss / self.accumulate))

    def average(self, gradient: Vector) -> None:
        """See `Engine`. All gradients are there at once, so there is no pass behind which they could travel."""
        grads = gradient.tensors
        if self.accumulate > 1:
            # By a number, not a tensor: a third in float32 would be all that a float64 gradient keeps of its digits.
            grads = list(torch._foreach_mul(grads, 1.0 / self.accumulate))
        if self._scaler.is_enabled():
            grads = list(torch._foreach_mul(grads, self._scaler.scale(torch.ones((), device=self._no_norm.device))))
        for param, grad in zip(gradient.params, grads, strict=True):
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        if self.ends_update:
            # Also those that only earlier micro-batches have.
            self._ranks.average_([param.grad for param in self.module.parameters() if param.grad is not None])

    def step(self, lr: float | None) -> Tensor:
        """See `Engine`."""
        self._ended += 1
        if self._ended < self.accumulate:
            return self._no_norm
        self._ended = 0
        if self._replicas is not None:
            self._replicas.check_averaged()
        if lr is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        params = [param for param in self.module.parameters() if param.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if self._options.clip_grad_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(params, self._options.clip_grad_norm, grad_norm)
        with skipping(self._optimizer, not_finite(grad_norm)):
            self._optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def momentum(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`."""
        return momentum_of(self._optimizer, params)

    def averaged(self, params: list[nn.Parameter]) -> list[Tensor]:
        """See `Engine`."""
        found = [torch.zeros_like(param) if param.grad is None else param.grad.clone() for param in params]
        if self._scaler.is_enabled():
            torch._foreach_div_(found, self._scaler.scale(torch.ones((), device=self._no_norm.device)))
        return found

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """See `Engine`."""
        if not keep:
            return {}
        return state_by_name(self.module, self._optimizer) | {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        load_by_name(self.module, self._optimizer, state)
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
