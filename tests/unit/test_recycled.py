"""Gradients that are recycled must be fit for use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esam_dist.clock import PhaseClock
from esam_dist.coordinate import Coordination
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule


@pytest.mark.parametrize("descent", ["recycled", "recycled_exact"])
def test_a_sample_that_is_not_finite_and_not_kept_leaves_the_weights_finite(descent, monkeypatch):
    kept = []
    end = Coordination.end
    monkeypatch.setattr(Coordination, "end", lambda selection: kept.append(end(selection)) or kept[-1])
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    engine = NativeEngine(module, torch.optim.SGD(module.parameters(), lr=0.1), Ranks())
    rule = Rule("esam", rho=0.05, radius=0.05, gamma=0.25, score="random", descent=descent)

    def step(images):
        batch = Batch(images, torch.zeros(8, dtype=torch.long))
        clock = PhaseClock(torch.device("cpu"))
        return esam_step(engine, batch, rule, lr=0.1, ranks=Ranks(), seed=(0,), clock=clock, memory=Memory())

    images = torch.randn(8, 3, 2, 2)
    assert not step(images).skipped
    not_kept = set(range(8)).difference(kept[-1].index_D.tolist())
    before = [param.clone() for param in module.parameters()]
    images[min(not_kept)] = torch.inf
    assert step(images).skipped
    assert all(param.isfinite().all() for param in module.parameters())
    assert any(not torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True))
