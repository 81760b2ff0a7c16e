"""How much each sample matters to the descent: the score by which SDS keeps samples.

Shapes: B samples, K outputs of the classifier, F inputs of its last layer.

forward   the rise of the sample's loss at the perturbed weights (ESAM section 3.3): one more forward pass
head      its first-order rise through the last linear layer: no pass, known right after the first forward
loss      the loss itself (K-SAM, Ni et al. 2022, arXiv 2210.12864)
random    nothing: the control
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from esam_dist.errors import UserError

Score = Literal["forward", "head", "loss", "random"]
FORWARD = "use method.score = forward"


def head_rise(slopes_BK: Tensor, inputs_BF: Tensor, *, bias: bool) -> Tensor:
    """First-order rise of each sample's loss along the gradient of the last layer, up to one common factor.

    With the slopes `d_i` of loss i by the layer's outputs, its gradient on the batch is `G = mean(d_j h_j^T)` for the
    weight and `mean(d_j)` for the bias; a step along it raises loss i by `d_i . (G h_i + mean(d_j))`. Returns [B].
    """
    h_BF = inputs_BF.to(slopes_BK.dtype)
    along_BK = h_BF @ (slopes_BK.T @ h_BF).T
    if bias:
        along_BK = along_BK + slopes_BK.sum(dim=0)
    return (slopes_BK * along_BK).sum(dim=1) / len(slopes_BK)


def find_head(module: nn.Module) -> nn.Linear:
    """The classifier: the last layer, where that is linear. Raises UserError where it is not."""
    layers = [child for child in module.modules() if next(child.parameters(recurse=False), None) is not None]
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise UserError(
            "method.score = head needs a network whose classifier is a linear layer, and this one has none; " + FORWARD
        )
    return layers[-1]


class Head:
    """The classifier of a network, watched for one pass.

    A compiled network must be watched before its first pass ever: afterwards it would not notice.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layer = find_head(module)
        if _remember not in self._layer._forward_hooks.values():
            self._layer.register_forward_hook(_remember)
        self._set(watched=False)

    def watch(self) -> None:
        """Take note of the next pass."""
        self._set(watched=True)

    def rise(self, outputs: Any, loss_B: Tensor) -> Tensor:
        """The score `head` of each sample of the pass that was watched, [B]; `loss_B` with its graph.

        Raises UserError where the classifier has no vector of outputs for each sample.
        """
        inputs, logits = self._layer.last_inputs, self._layer.last_outputs
        self._set(watched=False)
        if not isinstance(inputs, Tensor) or not isinstance(logits, Tensor) or logits.ndim != 2:
            raise UserError(
                "method.score = head: the classifier took no part, or has not one output per class; " + FORWARD
            )
        slopes = torch.autograd.grad(loss_B.sum(), logits, retain_graph=True, allow_unused=True)[0]
        if slopes is None and isinstance(outputs, Tensor) and outputs.shape == logits.shape:
            # A compiled network has two tensors for the same outputs; the loss depends on the one that it returns.
            (slopes,) = torch.autograd.grad(loss_B.sum(), outputs, retain_graph=True)
        if slopes is None or len(slopes) != len(loss_B):
            raise UserError(
                "method.score = head: the loss does not depend on the classifier sample by sample; " + FORWARD
            )
        return head_rise(slopes.float(), inputs, bias=self._layer.bias is not None)

    def _set(self, *, watched: bool) -> None:
        self._layer.is_watched = watched  # type: ignore[assignment]
        self._layer.last_inputs = self._layer.last_outputs = None  # type: ignore[assignment]


def _remember(head: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
    if head.is_watched:
        head.last_inputs, head.last_outputs = inputs[0].detach(), outputs
