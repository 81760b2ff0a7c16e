"""One replica and its batch, in one micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from esam_dist.step.swp import Draw, mask_elements
from tests.multiprocess.simulation.weights import Weights


class Rank:
    """Passes draw dropout one after the other; the first moves BatchNorm's statistics, and no other does."""

    def __init__(
        self,
        network: nn.Module,
        buffers: Weights,
        batch: tuple[Tensor, Tensor],
        generator: torch.Generator,
        label_smoothing: float,
    ) -> None:
        """`generator` is that of the step, and torch's own is seeded for it."""
        self.images, self.labels = batch
        self.size = len(self.labels)
        self.generator = generator
        self.buffers: Weights = {}
        """After the first pass."""
        self.loss_B = torch.empty(self.size, dtype=self.images.dtype)
        """At w, of the samples that were visited there."""
        self._network, self._buffers_before = network, buffers
        self._label_smoothing = label_smoothing
        self._first_dropout = self._next_dropout = torch.get_rng_state()

    def gradient(self, at: Weights, index: list[int] | None = None, *, is_clean: bool = False) -> Weights:
        """Of the mean loss of all samples, or of those at `index`; `is_clean`: `at` are the unperturbed weights."""
        leaves = leaves_of(at)
        losses = self.losses(leaves, index)
        if is_clean:
            self.loss_B[slice(None) if index is None else index] = losses.detach()
        return gradient(losses.mean(), leaves)

    def losses(self, at: Weights, index: list[int] | None = None) -> Tensor:
        """One pass more."""
        torch.set_rng_state(self._next_dropout)
        buffers = self._start()
        losses = self._forward(at, buffers, index)
        self._next_dropout = torch.get_rng_state()
        self.buffers = self.buffers or buffers
        return losses

    def losses_again(self, at: Weights) -> Tensor:
        """What the first pass would have been at other weights: with its dropout, and no trace."""
        torch.set_rng_state(self._first_dropout)
        return self._forward(at, self._start(), None)

    def compensated(self, direction: Weights, drawn: Draw) -> Weights:
        """`direction` over the drawn weights, by their factors and masks."""
        names = {param: name for name, param in self._network.named_parameters()}
        factors = drawn.factors or [1.0] * len(drawn.params)
        found = {names[p]: direction[names[p]] * f for p, f in zip(drawn.params, factors, strict=True)}
        if drawn.keep_element < 1.0:
            masks = [torch.ones_like(param) for param in drawn.params]
            mask_elements(masks, drawn.keep_element, self.generator)
            found = {names[p]: found[names[p]] * mask for p, mask in zip(drawn.params, masks, strict=True)}
        return found

    def _start(self) -> Weights:
        return {name: value.clone() for name, value in self._buffers_before.items()}

    def _forward(self, at: Weights, buffers: Weights, index: list[int] | None) -> Tensor:
        run = slice(None) if index is None else index
        logits = functional_call(self._network, at | buffers, (self.images[run],))
        return F.cross_entropy(logits, self.labels[run], reduction="none", label_smoothing=self._label_smoothing)


def leaves_of(weights: Weights) -> Weights:
    return {name: value.detach().clone().requires_grad_() for name, value in weights.items()}


def gradient(loss: Tensor, leaves: Weights) -> Weights:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))
