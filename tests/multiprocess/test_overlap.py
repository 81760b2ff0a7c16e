"""What ranks exchange is under way while each computes: the order of calls in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from esam_dist.engine.native import NativeEngine
from esam_dist.ranks import Pending, Ranks
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import Network, configuration, train_rank

UPDATE = ["averaged backward", "statistics sent", "statistics awaited"]
"""What every step ends with: BatchNorm's statistics are averaged after the update."""


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The calls inside the block, in order; each does what it always does."""
    events: list[str] = []
    under_way: dict[int, tuple[str, Pending]] = {}

    def noted(original: Callable[..., Any], event: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            events.append(event(*args))
            return original(*args, **options)

        return call

    def sent(original: Callable[..., Pending], name: Callable[..., str]) -> Callable[..., Pending]:
        def call(*args: Any) -> Pending:
            events.append(f"{name(*args)} sent")
            pending = original(*args)
            under_way[id(pending)] = (f"{name(*args)} awaited", pending)
            return pending

        return call

    wait = Pending.wait

    def awaited(pending: Pending) -> torch.Tensor:
        events.append(under_way[id(pending)][0])
        return wait(pending)

    with ExitStack() as patches:
        for name, event in (
            ("gather_later", lambda *_: "scores"),
            ("sum_later", lambda _, tensor: "statistics" if tensor.ndim else "count"),
        ):
            patches.enter_context(mock.patch.object(Ranks, name, sent(getattr(Ranks, name), event)))
        for owner, name, event in (
            (Network, "forward", lambda *_: "forward"),
            # The classifier's scores need a gradient too, by its outputs alone.
            (torch.autograd, "grad", lambda _, by: "slopes" if isinstance(by, torch.Tensor) else "ascent backward"),
            (NativeEngine, "backward", lambda *_: "averaged backward"),
        ):
            patches.enter_context(mock.patch.object(owner, name, noted(getattr(owner, name), event)))
        patches.enter_context(mock.patch.object(Pending, "wait", awaited))
        yield events


def calls_of_one_step(ranks: Ranks, cfg: Any) -> list[str]:
    with recorded() as events:
        train_rank(ranks, cfg, 1, torch.float32)
    return events


@pytest.mark.parametrize(
    ("score", "before"),
    [
        ("head", ["forward", "slopes", "scores sent", "ascent backward"]),
        ("loss", ["forward", "scores sent", "ascent backward"]),
        ("random", ["scores sent", "forward", "ascent backward"]),
    ],
)
def test_scores_travel_behind_the_passes_after_which_they_are_not_known_yet(
    two_ranks: Cluster, score: str, before: list[str]
) -> None:
    for events in two_ranks.run(calls_of_one_step, configuration({"score": score})):
        assert events == [*before, "scores awaited", "forward", *UPDATE]


@pytest.mark.parametrize(("score", "before"), [("loss", []), ("forward", ["ascent backward", "forward"])])
def test_kept_counts_travel_behind_the_forward_of_the_descent(
    two_ranks: Cluster, score: str, before: list[str]
) -> None:
    behind = [] if before else ["ascent backward"]
    for events in two_ranks.run(calls_of_one_step, configuration({"score": score, "transport": "thresholds"})):
        assert events == [
            "forward",
            *before,
            "scores sent",
            *behind,
            "scores awaited",
            "count sent",
            "forward",
            "count awaited",
            *UPDATE,
        ]
