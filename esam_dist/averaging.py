"""The average of the weights over the training, for any method: kept beside them, put in their place for validation.

Training never sees it. Replicas are identical to the bit, so their averages are too, without any exchange.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Kind = Literal["ema", "lawa"]


class WeightAverage:
    """The average of a module's trainable parameters, on their device, in float32 (of float64 in float64).

    `ema`: an exponential moving average, `a = d * a + (1 - d) * w`, which begins as the weights after the first update.
    d is `min(decay, (1 + t) / (10 + t))` after t updates, as in TensorFlow's `tf.train.ExponentialMovingAverage` with
    `num_updates`: the mean age of what is averaged is then a tenth of the run at most, so that the weights of the
    beginning, far from all that follow, are soon forgotten. Adam's correction of the bias (Kingma & Ba 2015, section 3)
    would give about the plain mean of all weights since the first, until 1 / (1 - decay) updates are made. Memory: one
    copy of the weights.

    `lawa`: Latest Weight Averaging (Kaddour 2022, arXiv 2209.14981), the plain mean of the `last` newest copies, one
    taken every `every` updates (the paper: at the end of each epoch). Memory: `last` copies of the weights, 4 bytes per
    weight each: 512 MB for five of ResNet-50.

    `torch.optim.swa_utils` is what tests compare with; it would deep-copy the module (compiled, hooked, or in the flat
    buffers of DeepSpeed), and has neither the changing decay nor the mean of the latest only.
    """

    def __init__(self, module: nn.Module, kind: Kind, *, decay: float = 0.999, last: int = 5, every: int = 1) -> None:
        self._kind, self._decay, self._every = kind, decay, every
        self._most = last if kind == "lawa" else 1
        self._params = _trainable(module)
        self._updates = 0
        self._statistics: dict[str, Tensor] = {}
        """BatchNorm's, of the average when it was last validated."""
        self._copies: list[list[Tensor]] = []
        """Of `lawa` oldest first; of `ema` its one average, or none before the first update."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as update number `step`, counted from 1, left them. The host does not wait."""
        if self._kind == "lawa" and step % self._every != 0:
            return
        weights = [param.to(_dtype(param)) for param in self._params.values()]
        if len(self._copies) < self._most:
            self._copies.append([weight.clone() for weight in weights])
        elif self._kind == "lawa":
            oldest = self._copies.pop(0)
            torch._foreach_copy_(oldest, weights)
            self._copies.append(oldest)
        else:
            decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(self._copies[0], weights, 1.0 - decay)
        self._updates += 1

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module`, with parameters of the same names, holds the average; before the first copy, its
        own weights. On leaving, also by an exception, its parameters and buffers (BatchNorm's statistics) are what
        they were, to the bit. Nothing changes its storage. Memory: one more copy of the weights.
        """
        weights = [param.detach() for param in _trainable(module).values()]
        changed = [*weights, *module.buffers()]
        raw = [tensor.clone() for tensor in changed]
        try:
            self._put(weights)
            yield
        finally:
            torch._foreach_copy_(changed, raw)

    def note_statistics(self, module: nn.Module) -> None:
        """Inside `averaged`: keep the module's present buffers beside the average, to be saved with it."""
        self._statistics = {name: buffer.to("cpu", copy=True) for name, buffer in module.named_buffers()}

    def _put(self, weights: list[Tensor]) -> None:
        if not self._copies:
            return
        torch._foreach_copy_(weights, self._copies[0])
        for copies in self._copies[1:]:
            torch._foreach_add_(weights, copies)
        torch._foreach_div_(weights, float(len(self._copies)))

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, on the CPU, by parameter name: alike for every engine and rank."""
        copies = [
            {name: copy.to("cpu", copy=True) for name, copy in zip(self._params, tensors, strict=True)}
            for tensors in self._copies
        ]
        return {"kind": self._kind, "updates": self._updates, "copies": copies, "statistics": self._statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned. From another kind, or `{}` of a run without, begin anew."""
        if state.get("kind") != self._kind:
            if state:
                logger.warning("the checkpoint holds an average of kind %s: %s begins anew", state["kind"], self._kind)
            return
        self._updates, self._statistics = state["updates"], dict(state.get("statistics", {}))
        self._copies = [
            [_like(param, saved[name]) for name, param in self._params.items()]
            for saved in state["copies"][-self._most :]
        ]


def averaged_model(model: dict[str, Tensor], average: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights, with their BatchNorm statistics, in the form of `model`, the raw ones of a checkpoint.

    `average` is what `WeightAverage.state_dict` has saved; frozen weights, which it does not hold, are `model`'s.
    """
    copies = average["copies"]
    means = {name: torch.stack([copy[name] for copy in copies]).mean(0) for name in (copies[0] if copies else {})}
    statistics: dict[str, Tensor] = average["statistics"]
    return model | {name: mean.to(model[name].dtype) for name, mean in means.items()} | statistics


class Summing(Protocol):
    """What `recompute_batchnorm` needs of the ranks (`esam_dist.ranks.Ranks`)."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks, and return it."""


@torch.no_grad()
def recompute_batchnorm(module: nn.Module, batches: Iterable[Tensor], ranks: Summing) -> int:
    """Set BatchNorm's statistics to those of `module`'s present weights on the images [B, 3, H, W] of `batches`.

    Averaged weights never made a pass: the statistics of the raw ones do not fit them (Izmailov et al. 2018, arXiv
    1803.05407). Each is the mean over the batches of all ranks, which may differ in number and size, with
    equal weight for every image. Only BatchNorm is in training mode, so that nothing random is drawn and dropout is off
    as in validation. Called by all ranks together: one all-reduce. Returns the images seen on all ranks; with none, or
    without BatchNorm, nothing changes (and without it, no batch is taken). A layer that a training module holds in
    evaluation mode, as frozen ones are, keeps its statistics.
    """
    norms = [
        child
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None
        if child.training or not module.training
    ]
    buffers = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    if not norms:
        return 0
    # In float64, for sums over many batches; the last is the number of images.
    totals = torch.zeros(sum(buffer.numel() for buffer in buffers) + 1, dtype=torch.float64, device=buffers[0].device)
    with _of_the_batch(module, norms):
        for images in batches:
            module(images)
            seen = torch.cat([*(buffer.flatten() for buffer in buffers), buffers[0].new_ones(1)])
            totals.add_(seen, alpha=len(images))
    num_images = int(ranks.sum_(totals)[-1].item())
    if num_images:
        means = torch.split(totals[:-1] / num_images, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)])
    return num_images


@contextmanager
def _of_the_batch(module: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Inside the block a pass leaves the statistics of its batch alone, and all else is as in validation."""
    modes = [(child, child.training) for child in module.modules()]
    momenta = [norm.momentum for norm in norms]
    # A count of training's passes: these are none, and ranks may make unequal numbers of them.
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    module.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        torch._foreach_copy_(counters, counts)


def zero3_fault(average: str, engine: str, zero_stage: int) -> tuple[bool, str]:
    """Whether `train.average` is refused for the engine, and the words."""
    return (
        average != "none" and engine == "deepspeed" and zero_stage == 3,
        f"train.average = {average} needs whole weights, which engine.zero_stage = 3 does not hold: give "
        "train.average = none, or zero_stage 0, 1 or 2",
    )


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, each once. A frozen weight is its own average."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def _dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _like(param: Tensor, saved: Tensor) -> Tensor:
    """`saved` beside `param`, laid out as it is: fused operations take only what is laid out alike."""
    return torch.empty_like(param, dtype=_dtype(param), requires_grad=False).copy_(saved)
