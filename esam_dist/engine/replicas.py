"""DistributedDataParallel, so that a training is the same to the bit whether or not it was interrupted.

DDP lays its buckets anew behind the first backward of a process, in the order in which the gradients came. A sum of
three or more addends depends on the place in the bucket, so the first update after a restart would be another one.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.step.examples import Tree, call


class Replicas:
    """A model on every rank, whose backward pass averages gradients. Made, and called, by all ranks together.

    Where the first pass does not use all parameters of a bare `module`, DDP is told; one that somebody has put into DDP
    stays as it is.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self._ranks, self._is_ours = ranks, not isinstance(module, DistributedDataParallel)
        self._ddp = module if isinstance(module, DistributedDataParallel) else in_ddp(module, ranks)
        self.module: nn.Module = self._ddp.module
        self._is_known = not self._is_ours
        self._averages = False
        lay_buckets(self._ddp)

    def __call__(self, inputs: Tree, *, averages: bool) -> Any:
        """The model's outputs, for `backward`; `averages`: that one averages over ranks."""
        self._averages = averages
        if averages and not self._is_known:
            # Which parameters are used is seen by the loss.
            return call(self.module, inputs)
        # DDP reads the flag in forward: that decides whether the backward will communicate.
        with nullcontext() if averages else self._ddp.no_sync():
            return call(self._ddp, inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        if self._averages and not self._is_known:
            self._is_known = True
            self._adapt_to(loss)
            loss = in_place_of_module(self._ddp, lambda: loss)
        torch.autograd.backward(loss)

    def check_averaged(self) -> None:
        """At the end of an update: raise UserError where DDP waits for a gradient, and so has not averaged others."""
        averaged, self._averages = self._averages, False
        if not averaged or self._ddp.find_unused_parameters or self._ddp.static_graph:
            return
        for name, param in self.module.named_parameters():
            if param.requires_grad and param.grad is None and name not in self._ddp.parameters_to_ignore:
                raise UserError(
                    f"parameter {name} has no part in this update's loss, and DDP averages nothing while it waits for "
                    "its gradient: let every pass use the same parameters, or give the model as "
                    "DistributedDataParallel(model, find_unused_parameters=True)"
                )

    def _adapt_to(self, loss: Tensor) -> None:
        """DDP anew where `loss` does not depend on all parameters: it would wait for their gradients in vain."""
        used = parameters_behind(loss)
        unused = [param for param in self.module.parameters() if param.requires_grad and used and param not in used]
        if self._ranks.sum_(torch.tensor(len(unused), device=self._ranks.device)).item():
            del self._ddp
            # It is part of a cycle, and holds memory as large as the weights.
            gc.collect()
            # The replicas are alike but for statistics, which are averaged and not sent. Buckets never change then.
            self._ddp = in_ddp(self.module, self._ranks, find_unused_parameters=True, init_sync=False)


def in_ddp(module: nn.Module, ranks: Ranks, **options: bool) -> DistributedDataParallel:
    """`module` in DDP, which averages its gradients; buffers are averaged after an update (`Ranks.average_buffers`)."""
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # From torch 2.15 on the argument has another name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    given: dict[str, Any] = {unsynced: False, **options}
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **given)


def lay_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP lay its final buckets with the next forward: the last parameters first, as backward passes go.

    One backward of zeros through the parameters alone: no statistic and no random state moves, no gradient is left. Not
    done where it would not be safe: gradients are there already, a hook of the user's would see it, or DDP takes the
    first pass for a model of all others (`static_graph`). With `find_unused_parameters` buckets never change.
    """
    params = [param for param in ddp.parameters() if param.requires_grad]
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    busy = any(param.grad is not None or any(getattr(param, name, None) for name in hooks) for param in params)
    hooked = getattr(ddp, "_comm_hooks", None) or ddp.mixed_precision is not None
    if busy or hooked or ddp.static_graph or ddp.find_unused_parameters:
        return
    with torch.enable_grad():
        sums: list[Tensor] = in_place_of_module(ddp, lambda: [param.sum() for param in params])
        torch.autograd.backward(sums, [torch.zeros_like(value) for value in sums])
    for param in params:
        param.grad = None


def in_place_of_module(ddp: DistributedDataParallel, forward: Callable[[], Any]) -> Any:
    """What `forward` returns, as if the module of `ddp` had computed it."""
    module, device = ddp.module, next(ddp.parameters()).device
    ddp.module = _Instead(module, forward)
    try:
        # An argument, for DDP moves arguments to its device, and wants one. Hooks of the user's are not called.
        return ddp.forward(torch.empty(0, device=device))  # type: ignore[no-untyped-call]
    finally:
        ddp.module = module


class _Instead(nn.Module):
    """`forward` as a module, with the buffers of the true one, which DDP may send."""

    def __init__(self, module: nn.Module, forward: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, _: Tensor) -> Any:
        """See the class."""
        return self._forward()


def parameters_behind(loss: Tensor) -> set[Tensor]:
    """The leaves that `loss` depends on; empty where the graph does not tell them (a checkpoint that is reentrant)."""
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen, found = set(waiting), set[Tensor]()
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            return set()
        if hasattr(node, "variable"):
            found.add(node.variable)
        fresh = [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen.update(fresh)
        waiting += fresh
    return found
