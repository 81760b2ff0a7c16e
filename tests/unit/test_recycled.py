"""Gradients that are recycled must be fit for use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esam_dist.data import Batch
from esam_dist.step.choice import Choice
from tests.steps import sharp, step, weights


@pytest.mark.parametrize("exact", [False, True])
def test_a_sample_that_is_not_finite_and_not_kept_leaves_the_weights_finite(exact, monkeypatch):
    kept = []
    end = Choice.end
    monkeypatch.setattr(Choice, "end", lambda choice: kept.append(end(choice)) or kept[-1])
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    batch = Batch(torch.randn(8, 3, 2, 2), torch.zeros(8, dtype=torch.long))
    method = sharp("recycled", gamma=0.25, exact=exact)
    assert not step(network, batch, method).skipped
    not_kept = set(range(8)).difference(kept[-1].index_D.tolist())
    before = weights(network)
    batch.images[min(not_kept)] = torch.inf
    assert step(network, batch, method).skipped
    assert torch.equal(kept[0].index_D, kept[1].index_D)
    assert all(param.isfinite().all() for param in network.parameters())
    assert any(not torch.equal(param, old) for param, old in zip(network.parameters(), before, strict=True))
