"""The loss of each sample, as `train.loss` and its like ask for it.

Shapes: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from esam_dist.step.examples import Loss
from esam_dist.train_keys import TrainKeys


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each sample, [B], from logits [B, K] and classes [B] or shares of classes [B, K]."""

    label_smoothing: float

    def __call__(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        return F.cross_entropy(logits_BK, labels, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Each class a question of its own, and a sample's loss the mean over all K of them, as timm trains with it
    (Wightman et al. 2021, arXiv 2110.00476, section 2). Labels and smoothing as for cross-entropy.
    """

    label_smoothing: float

    def __call__(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        K = logits_BK.shape[1]
        shares_BK = (F.one_hot(labels, K) if labels.ndim == 1 else labels).to(logits_BK.dtype)
        targets_BK = shares_BK * (1.0 - self.label_smoothing) + self.label_smoothing / K
        return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none").mean(dim=1)


@dataclass(frozen=True)
class Weighted:
    """`loss`, times the weight of the sample's class; of shares of classes, times the mean of their weights."""

    loss: Loss
    weight_K: Tensor

    def __call__(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        weight_B = self.weight_K[labels] if labels.ndim == 1 else labels.to(self.weight_K.dtype) @ self.weight_K
        return self.loss(logits_BK, labels) * weight_B.to(logits_BK.dtype)


def build_loss(train: TrainKeys, class_counts: Sequence[int] = (), device: torch.device | None = None) -> Loss:
    """What the configuration asks for, on `device`; `class_counts` are those of the training set."""
    kind = BinaryCrossEntropy if train.loss == "bce" else CrossEntropy
    loss = kind(train.label_smoothing)
    if train.class_weights == "none":
        return loss
    return Weighted(loss, torch.tensor(balanced(class_counts), device=device))


def balanced(class_counts: Sequence[int]) -> list[float]:
    """The weight of each class, inverse to its number of samples; over the whole set their mean is 1.

    So the mean of a batch need not be divided by its own weights, and is the same sum however ranks share the samples.
    """
    present = sum(count > 0 for count in class_counts)
    return [sum(class_counts) / (present * count) if count else 1.0 for count in class_counts]
