"""Validation over all ranks: every sample is counted exactly once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from esam_dist.data import Batch, ValidationData
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks


class Evaluation(NamedTuple):
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
def evaluate(
    module: nn.Module,
    data: ValidationData,
    ranks: Ranks,
    *,
    in_step: bool = False,
    through: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Evaluation:
    """Evaluate `module` in evaluation mode. All ranks call it together; each reads its share; all get the result.

    Ranks may hold unequal numbers of batches: the only collective is the sum at the end. `in_step` is for a module
    whose forward pass is itself a collective (ZeRO 3): a rank that has no batch left then takes part with an empty one.
    The batches go `through` whatever the caller wants to do between them; what it raises, on all ranks, ends the
    evaluation. Raises UserError, on all ranks, when no sample could be read.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    try:
        for images, labels in through(_in_step(data.batches(), ranks) if in_step else data.batches()):
            logits_BK = module(images)[: len(labels)]
            ranked = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels.unsqueeze(1)
            loss = F.cross_entropy(logits_BK, labels, reduction="sum")
            counted = loss.new_tensor(float(len(labels)))
            totals += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, counted])
    finally:
        module.train(was_training)
    first, top5, loss_sum, num_samples = ranks.sum_(totals).tolist()
    if not num_samples:
        raise UserError("data.path: not one sample of the validation set can be read; prepare the data again")
    return Evaluation(first / num_samples, top5 / num_samples, loss_sum / num_samples, int(num_samples))


def _in_step(batches: Iterator[Batch], ranks: Ranks) -> Iterator[Batch]:
    """The rank's batches, then, while any rank still has one, a single black image that is not counted."""
    empty: Batch | None = None
    while True:
        batch = next(batches, None)
        shape = torch.zeros(4, dtype=torch.int64) if batch is None else torch.tensor((1, *batch.images.shape[1:]))
        shapes = ranks.gather_later(shape.to(ranks.device)).wait()
        if not shapes.any():
            return
        if batch is None and empty is None:
            image = torch.zeros(shapes.max(dim=0).values.tolist(), device=ranks.device)
            empty = Batch(image, torch.zeros(0, dtype=torch.int64, device=ranks.device))
        yield cast("Batch", empty if batch is None else batch)
