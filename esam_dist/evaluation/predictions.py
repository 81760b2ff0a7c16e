"""What a network says of every sample of a validation set: each exactly once, whatever the number of ranks.

Letters: N samples of the set that could be read, B samples of a batch, K outputs, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.data import ValidationData
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks

Array = NDArray[Any]
COLUMNS = 6


@dataclass(frozen=True)
class Predictions:
    """One entry for each sample, in the order of the data; on every rank those of all ranks."""

    ids: Array  # [N] int64: the sample's number in the split
    labels: Array  # [N] int64
    predicted: Array  # [N] int64: the output of the highest logit
    confidence: Array  # [N] float64: its probability
    loss: Array  # [N] float64: cross-entropy
    in_top5: Array  # [N] bool: whether the label is among the five highest logits (all, with fewer outputs)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_right(self) -> Array:
        """Whether the label has the highest logit, [N] bool."""
        right: Array = self.predicted == self.labels
        return right


@torch.no_grad()
def predict(module: nn.Module, data: ValidationData, outputs: Sequence[int], ranks: Ranks) -> Predictions:
    """Put all of `data` through `module`; `outputs` says which output each of its classes is.

    All ranks call it together, and read their shares. Raises UserError, on all ranks, where no sample can be read, or
    logits are not finite.
    """
    module.eval()
    output_of = torch.tensor(outputs, device=ranks.device)
    parts = [torch.zeros(0, COLUMNS, dtype=torch.float64, device=ranks.device)]
    for (images, labels), ids in data.numbered():
        logits_BK = module(images)[: len(labels)].double()
        parts.append(_said(logits_BK, output_of[labels], torch.from_numpy(ids).to(ranks.device)))
    table = gathered(torch.cat(parts), ranks)
    if not len(table):
        raise UserError("data.path: not one sample of the validation set can be read; prepare the data again")
    if not np.isfinite(table).all():
        lost = int((~np.isfinite(table).all(axis=1)).sum())
        raise UserError(
            f"the network's outputs are not finite for {lost} of {len(table)} samples; evaluate with "
            "train.precision=fp32, or an earlier checkpoint (--checkpoint)"
        )
    sample, true, predicted = (table[:, column].astype(np.int64) for column in range(3))
    return Predictions(sample, true, predicted, np.minimum(table[:, 3], 1.0), table[:, 4], table[:, 5] > 0)


def _said(logits_BK: Tensor, labels_B: Tensor, ids_B: Tensor) -> Tensor:
    """The columns of Predictions, [B, COLUMNS] float64, in which numbers of samples and classes are exact too."""
    log_shares_BK = logits_BK.log_softmax(dim=1)
    top = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    confidence = log_shares_BK.gather(1, top[:, :1]).squeeze(1).exp()
    loss = F.nll_loss(log_shares_BK, labels_B, reduction="none")
    in_top5 = (top == labels_B.unsqueeze(1)).any(dim=1)
    return torch.stack([ids_B, labels_B, top[:, 0], confidence, loss, in_top5], dim=1)


def gathered(own: Tensor, ranks: Ranks) -> Array:
    """The rows of all ranks' tables [n, COLUMNS], n different on each, sorted by the first column: the sample."""
    counts = ranks.gather_later(torch.tensor([len(own)], device=ranks.device)).wait().flatten().tolist()
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    tables = ranks.gather_later(padded).wait()
    table = torch.cat([rows[:count] for rows, count in zip(tables, counts, strict=True)]).cpu().numpy()
    table = table[np.argsort(table[:, 0], kind="stable")]
    assert (np.diff(table[:, 0]) > 0).all(), "a sample was counted twice"
    return table
