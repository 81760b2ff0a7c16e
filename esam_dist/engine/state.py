"""Weights and optimizer state by parameter name: the form in which every engine saves and loads.

`{"model": {name: tensor}, "optimizer": {name: {key: tensor}}}`, all on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def on_host(value: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own, which training does not write to."""
    return value.detach().to("cpu", copy=True)


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers on the CPU."""
    return {name: on_host(value) for name, value in module.state_dict().items()}


def state_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer that holds the module's own parameters."""
    saved = {}
    for name, param in module.named_parameters():
        if param in optimizer.state:
            saved[name] = {
                key: on_host(torch.as_tensor(value))
                for key, value in optimizer.state[param].items()
                if value is not None
            }
    return {"model": model_state(module), "optimizer": saved}


def load_by_name(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse of `state_by_name`, in place: parameters keep their storage."""
    module.load_state_dict(state["model"])
    fused = {param: bool(group.get("fused")) for group in optimizer.param_groups for param in group["params"]}
    for name, param in module.named_parameters():
        if name in state["optimizer"]:
            optimizer.state[param] = {
                key: _beside(param, value, fused[param]) for key, value in state["optimizer"][name].items()
            }


def _beside(param: nn.Parameter, value: Tensor, is_fused: bool) -> Tensor:
    """A copy of `value` where the optimizer expects it: as the parameter lies, or a number."""
    if value.shape == param.shape:
        return torch.empty_like(param, dtype=value.dtype).copy_(value)
    # AdamW's count of updates lives on the CPU, but for a fused kernel.
    return value.to(param.device, copy=True) if is_fused else value.clone()


def initial_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """What SGD or AdamW would keep for `tensor` before its first update: from it, the first update is the same."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
    return {"momentum_buffer": torch.zeros_like(tensor)} if optimizer.defaults["momentum"] else {}


def momentum_key(optimizer: torch.optim.Optimizer) -> str:
    """Under which name the optimizer keeps its momentum: one of Adam's kind, or of SGD's."""
    return "exp_avg" if "betas" in optimizer.param_groups[0] else "momentum_buffer"


def momentum_factor(optimizer: torch.optim.Optimizer) -> float:
    """What the momentum keeps in an update (Adam's beta1); 0 for an optimizer without momentum."""
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def momentum_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the momentum of `params`; zero where there has been no update."""
    key = momentum_key(optimizer)
    kept = [optimizer.state[param].get(key) if param in optimizer.state else None for param in params]
    return [
        torch.zeros_like(param) if value is None else value.clone() for param, value in zip(params, kept, strict=True)
    ]
