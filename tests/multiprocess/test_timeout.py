"""A rank that waits in vain for another fails when `engine.collective_timeout_seconds` is over, under either engine."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import configuration, engine_of, make_network, rank_batch

SECONDS = 3.0


def go_on_alone(ranks: Ranks, cfg: Any) -> tuple[float, str]:
    """One update by both ranks, another by the first only: how long that waits before it fails, and why."""
    engine = engine_of(Classifier(make_network(torch.float32)), cfg, ranks)
    start = 0.0
    try:
        for step in range(2 if ranks.is_first else 1):
            start = time.monotonic()
            batch = rank_batch(ranks, step, 0, torch.float32, cfg.data.batch_size)
            engine.backward(F.cross_entropy(engine(batch.images), batch.labels))
            engine.step(0.1)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return 0.0, ""  # the process stays: not lost, only late


ENGINES = [
    pytest.param({"name": "native"}, id="native"),
    pytest.param({"name": "deepspeed", "zero_stage": 1}, id="zero", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_rank_fails_after_the_timeout_where_another_does_not_come(engine: dict[str, Any]) -> None:
    cfg = configuration({}, engine=engine | {"collective_timeout_seconds": SECONDS})
    # DeepSpeed averages over a group of its own, so the ranks may have joined with any timeout.
    joined_with = SECONDS if engine["name"] == "native" else 60.0
    with closing(Cluster(2, joined_with)) as cluster:
        (waited, reason), _ = cluster.run(go_on_alone, cfg)
    assert "Timed out" in reason
    assert SECONDS <= waited < 10 * SECONDS
