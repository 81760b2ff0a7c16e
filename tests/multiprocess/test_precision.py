"""The gradient of one update in mixed precision: whatever the loss scale the same, and near the one of float32.

The gradient of an update is what it adds to the momentum: averaged over ranks, without the loss scale, clipped.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from esam_dist.ranks import Ranks
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import Outcome, at_scale, configuration, train_rank
from tests.multiprocess.test_parity import ENGINES, simulate

# The first of them with LookSAM perturbs at every second update, the other reuses in between.
MODES: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam"},
    "esam_paper": {"swp_scale": "paper", "score": "forward"},
    "head": {"score": "head"},
    "recycled": {"name": "recycled", "score": "random", "gamma": 0.5},
    "recycled_exact": {"name": "recycled", "exact": True, "score": "random", "scope": "rank", "gamma": 0.5},
    "gsam": {"name": "gsam", "alpha": 0.4},
    "looksam": {"name": "looksam", "interval": 2, "alpha": 0.5},
    "looksam_between": {"name": "looksam", "interval": 2, "alpha": 0.5},
    "msam": {"name": "msam"},
}
SCALES = (1.0, 2.0**10, 2.0**14)
# Half the distance of two neighbouring numbers, relative to the larger: 8 and 11 bits of significand.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
# About 8 tensors are rounded one after the other on the way from images to logits, and as many on the way back: errors
# of either sign, which add up like the square root of their number.
ROUNDINGS = 4


class Update(NamedTuple):
    """What one update did, on one rank."""

    gradient: Tensor
    norms: list[float]
    """The norms reported before clipping, one for each micro-batch; nan where it ended no update."""
    skipped: list[float]
    scale: float


def first_step(mode: str) -> int:
    """The update to look at: there is momentum by then, and LookSAM has a flat part."""
    return 1 if mode == "looksam_between" else 2


def updates(ranks: Ranks, mode: str, sections: dict[str, Any]) -> dict[Any, Update]:
    """The same update from the same state in every precision; in float16 at every scale."""
    train, step = sections.get("train", {}), first_step(mode)

    def cfg(precision: str) -> Any:
        return configuration(MODES[mode], **sections | {"train": train | {"precision": precision}})

    start = train_rank(ranks, cfg("fp32"), step, torch.float32)
    found = {}
    for precision, scale in (("fp32", None), ("bf16", None), *(("fp16", scale) for scale in SCALES)):
        scaled = start if scale is None else at_scale(start, scale)
        end = train_rank(ranks, cfg(precision), 1, torch.float32, (scaled, step))
        reported = [float(stats.grad_norm) for stats in end.stats]
        skipped = [float(stats.skipped) for stats in end.stats]
        key = scale or precision
        found[key] = Update(added(start, end, cfg(precision)), reported, skipped, end.state["scaler"].get("scale", 0.0))
    return found


def added(start: Outcome, end: Outcome, cfg: Any) -> Tensor:
    """The gradient that took the momentum from `start` to `end`, of all parameters in one vector."""
    parts = []
    for name, after in end.state["optimizer"].items():
        before = start.state["optimizer"].get(name, {}).get("momentum_buffer", torch.zeros(()))
        weights = start.state["model"][name].double()
        step = after["momentum_buffer"].double() - cfg.optim.momentum * before.double()
        parts.append((step - cfg.optim.weight_decay * weights).flatten())
    return torch.cat(parts)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the other's norm."""
    return float((one - other).norm() / other.norm())


def assert_agree(found: dict[Any, Update]) -> None:
    exact = found["fp32"].gradient
    for precision, key in (("bf16", "bf16"), *(("fp16", scale) for scale in SCALES)):
        error = distance(found[key].gradient, exact)
        assert 0.0 < error <= ROUNDINGS * ROUNDING[precision], (key, error)
    # Powers of two change no digit. What remains is the float32 in which the momentum is kept, and ...
    assert distance(found[SCALES[1]].gradient, found[SCALES[2]].gradient) <= 1e-6
    # ... gradients of activations below float16's smallest normal number, 2**-14, which lose digits without a scale.
    assert distance(found[SCALES[0]].gradient, found[SCALES[2]].gradient) <= 2e-3
    for key, update in found.items():
        assert sum(update.skipped) == 0.0
        assert update.scale == (key if key in SCALES else 0.0), "the scale moved: an overflow"
        norms = zip(update.norms, found[SCALES[2]].norms, strict=True)
        tolerance = 2e-3 if key in SCALES else ROUNDINGS * ROUNDING["bf16"]
        assert all(one == pytest.approx(other, rel=tolerance, nan_ok=True) for one, other in norms), key


@pytest.mark.parametrize("mode", MODES)
def test_update_of_one_process_does_not_depend_on_the_loss_scale_and_is_near_float32(mode: str) -> None:
    assert_agree(updates(Ranks(), mode, {}))


@pytest.mark.parametrize(
    ("mode", "engine"),
    [
        pytest.param(mode, engine, marks=[] if mode in quick else pytest.mark.slow)
        for engine, quick in (("native", {"esam_paper", "gsam"}), ("zero1", {"recycled", "looksam_between"}))
        for mode in MODES
    ],
)
def test_update_of_two_ranks_does_not_depend_on_the_loss_scale_and_is_near_float32(
    two_ranks: Cluster, mode: str, engine: str
) -> None:
    ours, theirs = two_ranks.run(updates, mode, {"engine": ENGINES[engine]})
    assert_agree(ours)
    assert all(torch.equal(ours[key].gradient, theirs[key].gradient) for key in ours)


@pytest.mark.parametrize(
    ("mode", "engine"),
    [
        ("esam_paper", "native"),
        ("gsam", "zero1"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("recycled", "zero2"), ("gsam", "native"))),
    ],
)
def test_accumulated_gradients_are_clipped_without_their_loss_scale(two_ranks: Cluster, mode: str, engine: str) -> None:
    clip = 0.05
    sections = {"engine": ENGINES[engine], "train": {"accumulate": 2}, "optim": {"clip_grad_norm": clip}}
    found = two_ranks.run(updates, mode, sections)[0]
    assert_agree(found)
    for update in found.values():
        assert math.isnan(update.norms[0])
        assert update.norms[1] > 2 * clip
        # 1e-6 is added to the norm that divides; the rest is float32.
        assert float(update.gradient.norm()) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize(
    "mode",
    [{"name": "sam"}, {"name": "asam", "eta": 0.05}, {"name": "gsam", "alpha": 0.4}, {"beta": 1.0, "score": "random"}],
    ids=["sam", "asam", "gsam", "random"],
)
def test_zero3_in_mixed_precision_is_near_the_simulation_of_a_shared_perturbation(
    two_ranks: Cluster, mode: dict[str, Any]
) -> None:
    engine = {"name": "deepspeed", "zero_stage": 3}
    simulation = simulate(configuration(mode, engine=engine), steps=1)
    exact = torch.cat([value.flatten() for value in simulation.velocity.values()])
    for precision, rounding in ROUNDING.items():
        cfg = configuration(mode, engine=engine, train={"precision": precision})
        outcome = two_ranks.run(train_rank, cfg, 1, torch.float32)[0]
        saved = outcome.state["optimizer"]
        found = torch.cat([saved[f"network.{name}"]["momentum_buffer"].flatten() for name in simulation.velocity])
        assert 0.0 < distance(found.double(), exact) <= ROUNDINGS * rounding, precision
        assert [float(stats.skipped) for stats in outcome.stats] == [0.0]
