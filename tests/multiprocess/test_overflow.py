"""Float16 that overflows: in the ascent it costs the perturbation, in the descent the update, and never more.

A linear network, for its limits are known: the gradient of its weights is the sum of outer products of the logits'
gradients and the images. One image of the last rank is an outlier, far larger than all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist.data import Batch
from esam_dist.models import Classifier
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment, StepStats
from esam_dist.train import micro_batch
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import (
    BATCH,
    CLASSES,
    Outcome,
    at_scale,
    configuration,
    engine_of,
    scaler,
    train_rank,
)
from tests.multiprocess.test_training import ENGINES, assert_same_bits

LARGEST = torch.finfo(torch.float16).max
OUTLIER, KEPT = 32.0, 3
# The outlier's logits miss by the whole of 1, so its part of the ascent's gradient is OUTLIER / BATCH, the others'
# less than 1 / BATCH. A scale between overflows in the ascent, and not in a descent over KEPT others.
ASCENT_ONLY = 2.0**15
# A descent over nothing but the outlier has BATCH times the ascent's part of it.
DESCENT_ONLY = 2.0**12
assert ASCENT_ONLY * OUTLIER / BATCH > 2 * LARGEST
assert ASCENT_ONLY / KEPT < LARGEST / 2
assert DESCENT_ONLY * OUTLIER > LARGEST > 2 * DESCENT_ONLY * OUTLIER / BATCH


class Taken(NamedTuple):
    """What one update found and left, on one rank."""

    before: dict[str, Any]
    after: dict[str, Any]
    stats: StepStats


def linear_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))


def not_kept(step: int, rank: int) -> int:
    """The sample that a random score puts last."""
    return int(torch.rand(BATCH, generator=seed_step(0, step, 0, rank)).argmin())


def batch_with_outlier(network: nn.Module, step: int, rank: int, *, has_outlier: bool) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = torch.rand(BATCH, 3, 2, 2, generator=generator) - 0.5
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    if has_outlier:
        outlier = not_kept(step, rank)
        images[outlier] = OUTLIER * images[outlier].sign()
        with torch.no_grad():
            labels[outlier] = network(images)[outlier].argmin()
    return Batch(images, labels)


def take(ranks: Ranks, cfg: Any, scale: float) -> Taken:
    """One update without an outlier and at scale 1, so that there is momentum; then the one to look at."""
    classifier = Classifier(linear_network(), cfg.train.precision)
    trainer = SharpnessAware.over(engine_of(classifier, cfg, ranks), cfg.method, ranks, seed=cfg.run.seed)
    engine = trainer.engine
    before: dict[str, Any] = {}
    for step, loss_scale in ((0, 1.0), (1, scale)):
        before = engine.state_dict() | {"scaler": scaler(loss_scale)}
        engine.load_state_dict(before)
        # ZeRO 3 shows weights only in a step; the label needs the rough direction of the outlier, no more.
        batch = batch_with_outlier(
            linear_network(), step, ranks.rank, has_outlier=step == 1 and ranks.rank == ranks.world_size - 1
        )
        stats = micro_batch(trainer, batch, cfg, Moment(step), 0.01)
    return Taken(before, engine.state_dict(), StepStats(*(value.detach() for value in stats)))


def taken(request: pytest.FixtureRequest, engine: str, cfg: Any, scale: float) -> list[Taken]:
    if engine == "alone":
        return [take(Ranks(), cfg, scale)]
    cluster: Cluster = request.getfixturevalue("two_ranks")
    return cluster.run(take, cfg, scale)


def assert_nothing_moved(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Parameters and momentum; running statistics may have."""
    for name in before["optimizer"]:
        assert torch.equal(after["model"][name], before["model"][name]), name
    assert_same_bits(after["optimizer"], before["optimizer"])


def linear_configuration(engine: str, **method: Any) -> Any:
    method = {"beta": 1.0, "scope": "rank", "rho": 0.05} | method
    return configuration(method, engine=ENGINES[engine if engine != "alone" else "native"], train={"precision": "fp16"})


WHERE = ["alone", *ENGINES]


@pytest.mark.parametrize("engine", WHERE)
def test_overflow_of_the_ascent_alone_skips_the_perturbation_and_not_the_update(
    request: pytest.FixtureRequest, engine: str
) -> None:
    cfg = linear_configuration(engine, score="random", gamma=KEPT / BATCH)
    ranks = taken(request, engine, cfg, ASCENT_ONLY)
    last = len(ranks) - 1
    # Under ZeRO 3 all perturb along the average, or none.
    skipped = [engine == "zero3" or rank == last for rank in range(len(ranks))]
    assert [bool(one.stats.skipped) for one in ranks] == skipped
    for one in ranks:
        assert one.after["scaler"]["scale"] == ASCENT_ONLY
    expected = torch.stack([by_hand(ranks[0].before, cfg, rank, last, skipped[rank]) for rank in range(len(ranks))])
    added = (
        ranks[0].after["optimizer"]["network.1.weight"]["momentum_buffer"]
        - cfg.optim.momentum * ranks[0].before["optimizer"]["network.1.weight"]["momentum_buffer"]
        - cfg.optim.weight_decay * ranks[0].before["model"]["network.1.weight"]
    )
    # Six tensors are rounded on the way: images, weights, logits, their gradients, the weights', and the scale's.
    assert float((added.double() - expected.mean(0)).norm()) <= 6 * 2.0**-11 * float(expected.mean(0).norm())


def by_hand(before: dict[str, Any], cfg: Any, rank: int, last: int, skipped: bool) -> Tensor:
    """One rank's gradient of the weights in float64: at w where the perturbation is skipped, else at w + eps."""
    batch = batch_with_outlier(linear_network(), 1, rank, has_outlier=rank == last)
    images = batch.images.double().flatten(1)
    weight, bias = (before["model"][f"network.1.{name}"].double().requires_grad_() for name in ("weight", "bias"))
    if not skipped:
        grads = torch.autograd.grad(F.cross_entropy(F.linear(images, weight, bias), batch.labels), (weight, bias))
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        weight, bias = (
            (param + 0.05 * grad / norm).detach().requires_grad_()
            for param, grad in zip((weight, bias), grads, strict=True)
        )
    kept = torch.rand(BATCH, generator=seed_step(0, 1, 0, rank)).argsort(descending=True)[:KEPT]
    loss = F.cross_entropy(F.linear(images[kept], weight, bias), batch.labels[kept])
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("engine", WHERE)
def test_overflow_of_the_descent_alone_skips_the_update_and_halves_the_scale_on_all_ranks(
    request: pytest.FixtureRequest, engine: str
) -> None:
    cfg = linear_configuration(engine, score="loss", gamma=1 / BATCH)
    for one in taken(request, engine, cfg, DESCENT_ONLY):
        assert float(one.stats.skipped) == 0.0
        assert one.after["scaler"]["scale"] == DESCENT_ONLY / 2
        assert_nothing_moved(one.before, one.after)


def overflow_once(ranks: Ranks, cfg: Any) -> Taken:
    """A sound update, then one at a loss scale that nothing survives."""
    first = at_scale(train_rank(ranks, cfg, 1, torch.float32), 2.0**40)
    second = train_rank(ranks, cfg, 1, torch.float32, (first, 1))
    return Taken(first.state, second.state, second.stats[0])


METHODS: dict[str, dict[str, Any]] = {
    "esam": {"scope": "rank"},
    "recycled": {"name": "recycled", "score": "forward", "gamma": 0.5},
    "recycled_exact": {"name": "recycled", "exact": True, "score": "random", "scope": "rank", "gamma": 0.5},
    "asam": {"name": "asam"},
    "gsam": {"name": "gsam"},
    "looksam_between": {"name": "looksam", "interval": 2},
}


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        *((method, "native") for method in METHODS),
        *(("esam", engine) for engine in ("zero1", "zero2")),
        ("looksam_between", "zero1"),
        *((method, "zero3") for method in ("asam", "gsam")),
    ],
)
def test_overflow_of_both_passes_skips_perturbation_and_update_and_halves_the_scale(
    two_ranks: Cluster, method: str, engine: str
) -> None:
    cfg = configuration(METHODS[method], engine=ENGINES[engine], train={"precision": "fp16"})
    for one in two_ranks.run(overflow_once, cfg):
        # LookSAM between two perturbations has none to skip.
        assert float(one.stats.skipped) == (0.0 if method == "looksam_between" else 1.0)
        assert one.after["scaler"]["scale"] == 2.0**39
        assert_nothing_moved(one.before, one.after)
        # The forward pass was sound: its statistics are kept.
        assert all(torch.isfinite(value).all() for value in one.after["model"].values())


def test_looksam_that_overflows_while_perturbing_does_without_a_flat_part_for_that_update(two_ranks: Cluster) -> None:
    cfg = configuration({"name": "looksam", "interval": 2}, train={"precision": "fp16"})
    for start in two_ranks.run(train_rank, cfg, 2, torch.float32):
        assert start.memory["flat"]
    outcomes = two_ranks.run(overflow_of_a_perturbing_step, cfg)
    for one, memory in outcomes:
        assert_nothing_moved(one.before, one.after)
        assert all(torch.isfinite(tensor).all() for tensor in memory["flat"])


def overflow_of_a_perturbing_step(ranks: Ranks, cfg: Any) -> tuple[Taken, dict[str, Any]]:
    first = at_scale(train_rank(ranks, cfg, 2, torch.float32), 2.0**40)
    second = train_rank(ranks, cfg, 1, torch.float32, (first, 2))
    return Taken(first.state, second.state, second.stats[0]), second.memory


def test_accumulation_in_float16_seldom_skips_the_perturbation() -> None:
    """A loss scale that grows until the descent overflows must not by then be too large for the ascent."""
    cfg = configuration({"gamma": 0.5}, train={"precision": "fp16", "accumulate": 8}, optim={"lr": 0.01})
    start = train_rank(Ranks(), cfg, 0, torch.float32)
    state = start.state | {"scaler": scaler(2.0**14, growth_interval=4)}
    end = train_rank(Ranks(), cfg, 60, torch.float32, (Outcome(state, "", [], {}), 0))
    # 15 times it would have doubled: it has met its limit, and what follows is as it would be for ever.
    assert end.state["scaler"]["scale"] < 2.0**14 * 2.0**12
    skipped = [float(stats.skipped) for stats in end.stats]
    # An overflow every 4 updates or so, before which the ascent may fail as well.
    assert sum(skipped) / len(skipped) < 0.3
