"""Validation over all ranks, counted exactly: every sample once, whatever the number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.data import ValidationData
from esam_dist.ranks import Ranks


class Score(NamedTuple):
    """How well a model does on a validation set."""

    accuracy: float
    """Share of samples whose label has the highest logit, in [0, 1]."""
    top5_accuracy: float
    """Share of samples whose label is among the five highest logits (all, with fewer than five classes)."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    num_samples: int
    """Samples counted, over all ranks."""


@torch.no_grad()
def evaluate(module: nn.Module, data: ValidationData, ranks: Ranks) -> Score:
    """Score `module` in evaluation mode. Called by all ranks together; each reads its share; all get the result.

    Ranks may hold unequal numbers of batches: the only collective is the sum at the end.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for images, labels in data.batches():
        logits_BK = module(images)
        ranked = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(logits_BK, labels, reduction="sum")
        counted = loss.new_tensor(float(len(labels)))
        totals += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, counted])
    module.train(was_training)
    first, top5, loss_sum, num_samples = ranks.sum_(totals).tolist()
    return Score(first / num_samples, top5 / num_samples, loss_sum / num_samples, int(num_samples))
