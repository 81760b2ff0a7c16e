"""How much each sample matters to the descent: the score by which SDS keeps samples.

Shapes: B samples, K classes, F inputs of the last layer.

forward   the rise of the sample's loss at the perturbed weights (ESAM section 3.3): one more forward pass
head      its first-order rise through the last linear layer: no pass, known right after the first forward
loss      the loss itself (K-SAM, Ni et al. 2022, arXiv 2210.12864)
random    nothing: the control
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.errors import UserError


def head_rise(logits_BK: Tensor, targets_BK: Tensor, inputs_BF: Tensor) -> Tensor:
    """First-order rise of each sample's cross-entropy along the gradient of the last layer, up to one common factor.

    With `d_i = softmax(z_i) - y_i`, that layer's gradient on the batch is `G = mean(d_j h_j^T)` for the weight and
    `mean(d_j)` for the bias; a step along it raises loss i by `d_i . (G h_i + mean(d_j))`. Returns [B].
    """
    d_BK = logits_BK.softmax(dim=1) - targets_BK
    h_BF = inputs_BF.to(d_BK.dtype)
    gradient_KF = d_BK.T @ h_BF
    return (d_BK * (h_BF @ gradient_KF.T + d_BK.sum(dim=0))).sum(dim=1) / len(d_BK)


def targets_of(labels: Tensor, logits_BK: Tensor, label_smoothing: float) -> Tensor:
    """The distribution over classes that cross-entropy compares with: [B, K] from classes [B] or shares [B, K]."""
    K = logits_BK.shape[1]
    shares_BK = F.one_hot(labels, K) if labels.ndim == 1 else labels
    return shares_BK.to(logits_BK.dtype) * (1.0 - label_smoothing) + label_smoothing / K


def find_head(module: nn.Module) -> nn.Linear:
    """The classifier: the last layer, where that is linear. Raises UserError where it is not."""
    layers = [child for child in module.modules() if next(child.parameters(recurse=False), None) is not None]
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise UserError(
            "method.score = head needs a network whose classifier is a linear layer, and this one has none; "
            "use method.score = forward"
        )
    return layers[-1]


def watched_head(module: nn.Module) -> nn.Linear:
    """The classifier of `module`, which from now on remembers what last reached it: see `head_input`.

    A compiled network must be watched before its first pass: afterwards it would not notice.
    """
    head = find_head(module)
    if _remember not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_remember)
    return head


def head_input(head: nn.Linear) -> Tensor:
    """What reached a watched head in the latest forward pass, [B, F]."""
    assert isinstance(head.last_input, Tensor)
    return head.last_input


def _remember(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    head.last_input = inputs[0].detach()
