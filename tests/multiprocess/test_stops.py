"""A stop that one rank alone hears of, in the middle of a validation whose shares are unequal."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from esam_dist.data import Batch
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from esam_dist.validation import Ahead, validate
from tests.multiprocess.cluster import Cluster

SHARES = (12, 3)


class Shares:
    """Batches that take a while; `read` counts them. The second rank is done first."""

    most_batches, skipped = max(SHARES), {}

    def __init__(self, rank: int) -> None:
        self.read, self._count = 0, SHARES[rank]

    def batches(self) -> Any:
        for number in range(self._count):
            time.sleep(0.15)
            self.read += 1
            yield Batch(torch.eye(6)[:2], torch.tensor([0, number % 2]))


def validate_rank(ranks: Ranks, who: int, after: int, average: Any = None) -> tuple[float | None, int, float, bool]:
    """Rank `who` wants to stop when it has read `after` batches: its accuracy, its batches, its seconds, its mode."""
    shares, module = Shares(ranks.rank), nn.Identity().train()
    engine = SimpleNamespace(module=module, calls_together=False)
    run: Any = SimpleNamespace(
        trainer=SimpleNamespace(ranks=ranks, engine=engine),
        stop_requested=lambda: ranks.rank == who and shares.read >= after,
        validation=shares,
        metrics=SimpleNamespace(heartbeat=lambda: None, validation=lambda row: None),
        progress=Progress(),
        data=SimpleNamespace(num_samples=1),
        average=average,
    )
    start = time.monotonic()
    return validate(run, Ahead(iter(()))), shares.read, time.monotonic() - start, module.training


@pytest.mark.parametrize(("who", "after"), [(0, 2), (1, 1), (1, 3)])
def test_all_ranks_end_a_validation_soon_after_one_is_told_to(two_ranks: Cluster, who: int, after: int) -> None:
    answers = two_ranks.run(validate_rank, who, after)
    for accuracy, read, _, is_training in answers:
        assert accuracy is None
        assert read <= after + 2
        assert is_training


def test_without_a_stop_all_batches_count(two_ranks: Cluster) -> None:
    answers = two_ranks.run(validate_rank, 0, 99)
    assert [read for _, read, _, _ in answers] == list(SHARES)
    assert answers[0][0] == answers[1][0]
    assert answers[0][0] is not None
