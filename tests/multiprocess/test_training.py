"""What must hold over many updates: replicas identical, resume exact, results independent of the number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esam_dist.data import Batch
from esam_dist.evaluate import evaluate
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment
from esam_dist.train import micro_batch
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import (
    BATCH,
    CLASSES,
    Outcome,
    configuration,
    engine_of,
    make_batch,
    make_network,
    train_rank,
)

ENGINES = {
    "native": {"name": "native"},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}


def assert_same_bits(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same_bits(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("engine", ENGINES)
def test_replicas_are_identical_to_the_bit_after_50_updates(two_ranks: Cluster, engine: str) -> None:
    method = {"beta": 1.0} if engine == "zero3" else {"scope": "global"}
    outcomes = two_ranks.run(train_rank, configuration(method, engine=ENGINES[engine]), 50, torch.float32)
    assert outcomes[0].digest == outcomes[1].digest
    # ... although the ranks kept unequal numbers of samples, and perturbed along gradients of their own.
    kept = [[float(stats.num_kept) for stats in outcome.stats] for outcome in outcomes]
    assert kept[0] != kept[1]
    assert all(a + b == BATCH for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(two_ranks: Cluster, engine: str, optimizer: str) -> None:
    method = {"beta": 1.0} if engine == "zero3" else {}
    optim = {"name": optimizer, "lr": 0.01}
    cfg = configuration(method, engine=ENGINES[engine], optim=optim)
    whole = two_ranks.run(train_rank, cfg, 6, torch.float32)
    first = two_ranks.run(train_rank, cfg, 3, torch.float32)
    second = two_ranks.run(train_rank, cfg, 3, torch.float32, (first[0], 3))
    assert first[0].digest != second[0].digest
    assert_same_bits(second[0].state, whole[0].state)


def test_looksam_resumes_between_two_perturbations(two_ranks: Cluster) -> None:
    cfg = configuration({"name": "looksam", "interval": 4})
    whole = two_ranks.run(train_rank, cfg, 6, torch.float32)
    first = two_ranks.run(train_rank, cfg, 2, torch.float32)
    second = two_ranks.run(train_rank, cfg, 4, torch.float32, (first[0], 2))
    assert_same_bits(second[0].state, whole[0].state)
    forgotten = two_ranks.run(train_rank, cfg, 4, torch.float32, (Outcome(first[0].state, "", [], {}), 2))
    assert forgotten[0].digest != whole[0].digest


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["native", "zero1"])
def test_mixed_precision_resumes_to_the_bit_and_stays_near_float32(
    two_ranks: Cluster, engine: str, precision: str
) -> None:
    cfg = configuration({"scope": "rank"}, engine=ENGINES[engine], train={"precision": precision})
    whole = two_ranks.run(train_rank, cfg, 4, torch.float32)
    first = two_ranks.run(train_rank, cfg, 2, torch.float32)
    second = two_ranks.run(train_rank, cfg, 2, torch.float32, (first[0], 2))
    assert_same_bits(second[0].state, whole[0].state)
    exact = two_ranks.run(train_rank, configuration({"scope": "rank"}), 1, torch.float32)
    rounded = whole[0].stats[0]
    # One rounding of the forward pass: 8 bits of mantissa in bfloat16, 11 in float16.
    assert float(rounded.loss) == pytest.approx(float(exact[0].stats[0].loss), rel=2**-7)
    assert float(rounded.loss) != float(exact[0].stats[0].loss)


@pytest.mark.parametrize("stage", [1, 2])
def test_run_changes_from_deepspeed_to_native_and_back(two_ranks: Cluster, stage: int) -> None:
    native, zero = (
        configuration({}, engine=engine) for engine in (ENGINES["native"], {"name": "deepspeed", "zero_stage": stage})
    )
    whole = two_ranks.run(train_rank, native, 6, torch.float32)
    outcome = two_ranks.run(train_rank, zero, 2, torch.float32)
    outcome = two_ranks.run(train_rank, native, 2, torch.float32, (outcome[0], 2))
    outcome = two_ranks.run(train_rank, zero, 2, torch.float32, (outcome[0], 4))
    for name, value in whole[0].state["model"].items():
        torch.testing.assert_close(outcome[0].state["model"][name], value, rtol=2e-5, atol=2e-5)


def test_groups_of_samples_make_results_independent_of_the_number_of_ranks(two_ranks: Cluster) -> None:
    method = {"scope": "rank", "group_size": 3}
    spread = two_ranks.run(train_rank, configuration(method), 4, torch.float64)
    alone = train_rank(Ranks(), configuration(method, data={"batch_size": 2 * BATCH}), 4, torch.float64)
    # Sums over groups and over ranks are taken in another order; that is all.
    for name, value in alone.state["model"].items():
        torch.testing.assert_close(spread[0].state["model"][name], value, rtol=1e-11, atol=1e-12)
    whole = train_rank(Ranks(), configuration({"scope": "rank"}, data={"batch_size": 2 * BATCH}), 4, torch.float64)
    assert whole.digest != alone.digest


class Branches(nn.Module):
    """Bright images take another way than dark ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bright, self.dark = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return (self.bright if images.mean() > 0 else self.dark)(images.mean(dim=(2, 3)))


def train_branches(ranks: Ranks, cfg: Any) -> dict[str, Tensor]:
    """One update whose first micro-batch is bright and whose last is dark; how far the weights moved."""
    network = Branches()
    before = {name: param.detach().clone() for name, param in network.named_parameters()}
    trainer = SharpnessAware.over(engine_of(network, cfg, ranks), cfg.method, ranks)
    for micro, sign in enumerate((1.0, -1.0)):
        images, labels = make_batch(ranks.rank, 0, micro, torch.float32)
        micro_batch(trainer, Batch(sign * images.abs(), labels), cfg, Moment(), cfg.optim.lr)
    return {name: param.detach() - before[name] for name, param in network.named_parameters()}


def test_weights_that_only_an_earlier_micro_batch_uses_move_alike_on_all_ranks(two_ranks: Cluster) -> None:
    cfg = configuration({"name": "gsam"}, train={"accumulate": 2})
    ours, theirs = two_ranks.run(train_branches, cfg)
    assert all(moved.norm() > 0 for moved in ours.values())
    assert_same_bits(ours, theirs)


class Shares:
    """Validation data of which the first rank has two batches and the second none."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(5, 3, 8, 8, generator=generator)
        self.labels = torch.randint(5, (5,), generator=generator)
        self.parts = [slice(0, 3), slice(3, 5)] if rank == 0 else []

    def batches(self) -> Any:
        yield from (Batch(self.images[part], self.labels[part]) for part in self.parts)


def score_rank(ranks: Ranks, cfg: Any) -> Any:
    classifier = Classifier(make_network(torch.float32))
    engine = engine_of(classifier, cfg, ranks)
    return evaluate(engine.module, Shares(ranks.rank), ranks, in_step=engine.calls_together)


def test_zero3_validates_where_ranks_have_unequal_numbers_of_batches(two_ranks: Cluster) -> None:
    scores = [two_ranks.run(score_rank, configuration({"name": "sgd"}, engine=ENGINES[e])) for e in ("native", "zero3")]
    assert scores[0][0] == scores[0][1]
    assert scores[1][0] == scores[1][1]
    assert scores[0][0].num_samples == scores[1][0].num_samples == 5
    assert scores[1][0].loss == pytest.approx(scores[0][0].loss, rel=1e-6)
    assert scores[1][0].accuracy == scores[0][0].accuracy


class Tied(nn.Module):
    """One weight under two names, one that is frozen, and a buffer that no state holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, CLASSES)
        self.frozen.requires_grad_(False)
        self.second.weight = self.first.weight
        self.register_buffer("passing", torch.ones(5), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(self.passing * self.frozen(images.mean(dim=(2, 3)))).tanh())


def train_tied(ranks: Ranks, cfg: Any, start: dict[str, Any] | None, steps: range) -> dict[str, Any]:
    engine = engine_of(Tied(), cfg, ranks)
    trainer = SharpnessAware.over(engine, cfg.method, ranks)
    if start is not None:
        engine.load_state_dict(start)
    for step in steps:
        micro_batch(trainer, Batch(*make_batch(ranks.rank, step, 0, torch.float32)), cfg, Moment(step), 0.1)
    return engine.state_dict()


def test_zero3_saves_frozen_and_tied_weights_and_goes_on_from_them_as_the_native_engine(two_ranks: Cluster) -> None:
    native, zero3 = (configuration({"name": "sgd"}, engine=ENGINES[name]) for name in ("native", "zero3"))
    whole = two_ranks.run(train_tied, native, None, range(4))[0]
    with torch.no_grad():
        start = two_ranks.run(train_tied, native, None, range(2))[0]
        # Other weights than a new model has, so that they must come from the state.
        start["model"]["frozen.bias"] = start["model"]["frozen.bias"] + 1.0
    for first, second in ((zero3, native), (native, zero3), (zero3, zero3)):
        state = two_ranks.run(train_tied, first, start, range(0))[0]
        assert_same_bits(state["model"], start["model"])
        state = two_ranks.run(train_tied, first, None, range(2))[0]
        state = two_ranks.run(train_tied, second, state, range(2, 4))[0]
        assert state["model"].keys() == whole["model"].keys()
        for name, value in whole["model"].items():
            torch.testing.assert_close(state["model"][name], value, rtol=2e-5, atol=2e-5)


def snapshot_rank(ranks: Ranks, cfg: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first rank keeps after two updates, and a deep copy made before two more."""
    trainer = SharpnessAware.over(engine_of(Classifier(make_network(torch.float32)), cfg, ranks), cfg.method, ranks)

    def update(step: int) -> None:
        micro_batch(trainer, Batch(*make_batch(ranks.rank, step, 0, torch.float32)), cfg, Moment(step), 0.1)

    update(0)
    update(1)
    taken = trainer.engine.state_dict(keep=ranks.is_first)
    before = copy.deepcopy(taken)
    update(2)
    update(3)
    return taken, before


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("engine", ENGINES)
def test_snapshot_is_the_first_ranks_alone_and_later_updates_leave_it_alone(
    two_ranks: Cluster, engine: str, optimizer: str
) -> None:
    cfg = configuration({"name": "sgd"}, engine=ENGINES[engine], optim={"name": optimizer, "lr": 0.01})
    (taken, before), (theirs, _) = two_ranks.run(snapshot_rank, cfg)
    assert theirs == {}
    assert len(before["optimizer"]) == len(list(make_network(torch.float32).parameters()))
    assert_same_bits(taken, before)
