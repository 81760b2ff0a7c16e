"""Three ranks and more, for sums of two addends do not depend on their order: a restart changes no bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist import SharpnessAware, methods
from esam_dist.checkpoint import read
from esam_dist.data import Batch
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.step import Moment
from esam_dist.train import micro_batch
from tests.commands import TIMEOUT_SECONDS, on_ranks
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import CLASSES, configuration, engine_of, make_batch
from tests.multiprocess.test_training import assert_same_bits

ENGINES = {"native": ["engine.name=native"], "zero1": ["engine.name=deepspeed", "engine.zero_stage=1"]}
ONE_BUCKET, SEVERAL = "cifar_resnet8", "cifar_resnet20"
"""DDP's first bucket takes 1 MB; the larger network has a second one, of its last half."""


@pytest.mark.timeout(TIMEOUT_SECONDS)
@pytest.mark.parametrize(
    ("count", "engine", "network"),
    [
        (3, "native", ONE_BUCKET),
        (4, "native", ONE_BUCKET),
        (3, "native", SEVERAL),
        pytest.param(3, "zero1", ONE_BUCKET, marks=pytest.mark.slow),
        pytest.param(4, "zero1", SEVERAL, marks=pytest.mark.slow),
    ],
)
def test_eight_updates_equal_four_a_restart_and_four(tiny, tmp_path, count: int, engine: str, network: str) -> None:
    run = ("train", tiny, *ENGINES[engine], f"model.name={network}", "train.max_steps=8")
    for folder, stops in (("whole", [8]), ("parts", [4, 8])):
        for last in stops:
            answers = on_ranks(*run, f"run.folder={tmp_path / folder}", f"train.max_steps={last}", count=count)
            assert [answer.status for answer in answers] == [0] * count, answers[0].err
    whole, parts = (read(tmp_path / folder / "checkpoints/step_00000008")["engine"] for folder in ("whole", "parts"))
    assert_same_bits(parts, whole)


class Wide(nn.Module):
    """BatchNorm, dropout, and more weights than one bucket takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2))
        self.wide = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 128), nn.ReLU())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.wide(self.body(images[:, :, :4, :4].flatten(1))))


def losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def adopted(ranks: Ranks, options: dict[str, Any], start: dict[str, Any] | None, steps: range) -> dict[str, Any]:
    """SAM on a model in DDP as a user may make it, for some of its updates; what it has then."""
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SharpnessAware(DistributedDataParallel(model, **options), optimizer, methods.SAM(rho=0.05))
    if start is not None:
        # What comes through a pipe lies in memory that all ranks share.
        start = copy.deepcopy(start)
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        trainer.load_state_dict(start["trainer"])
    for step in steps:
        trainer.step(*make_batch(ranks.rank, step, 0, torch.float32), losses)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "trainer": trainer.state_dict()}


@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 0.1}, {"find_unused_parameters": True}])
def test_a_model_that_a_user_has_put_into_ddp_goes_on_to_the_bit(three_ranks: Cluster, options: dict[str, Any]) -> None:
    whole = three_ranks.run(adopted, options, None, range(6))
    first = three_ranks.run(adopted, options, None, range(3))
    second = three_ranks.run(adopted, options, first[0], range(3, 6))
    assert_same_bits(second[0]["model"], whole[0]["model"])
    assert_same_bits(second[0]["optimizer"]["state"], whole[0]["optimizer"]["state"])


def made(ranks: Ranks, *, has_gradients: bool) -> tuple[bool, bool, bool]:
    """What making a trainer moves: the model's state, random state, gradients."""
    model = Wide()
    if has_gradients:
        model(make_batch(ranks.rank, 0, 0, torch.float32)[0]).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
    random = torch.get_rng_state()
    ddp = DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
    SharpnessAware(ddp, torch.optim.SGD(model.parameters(), lr=0.1), methods.SAM())
    after = model.state_dict()
    moved = not all(torch.equal(after[name], before[name]) for name in before)
    graded = not all(
        param.grad is None if grad is None else torch.equal(param.grad, grad)
        for param, grad in zip(model.parameters(), grads, strict=True)
    )
    return moved, not torch.equal(torch.get_rng_state(), random), graded


@pytest.mark.parametrize("has_gradients", [False, True])
def test_making_a_trainer_moves_nothing(three_ranks: Cluster, has_gradients: bool) -> None:
    assert three_ranks.run(made_with if has_gradients else made_without) == [(False, False, False)] * 3


def made_with(ranks: Ranks) -> tuple[bool, bool, bool]:
    return made(ranks, has_gradients=True)


def made_without(ranks: Ranks) -> tuple[bool, bool, bool]:
    return made(ranks, has_gradients=False)


class Partly(nn.Module):
    """A network with a layer that no pass uses, or that only the first update's do; or without one."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.used = nn.BatchNorm1d(3), nn.Linear(3, CLASSES)
        if layer != "absent":
            self.other = nn.Linear(3, CLASSES)
        self.uses_other = layer == "used first"

    def forward(self, images: Tensor) -> Tensor:
        means = self.norm(images.mean(dim=(2, 3)))
        return self.used(means) + self.other(means) if self.uses_other else self.used(means)


def train_partly(ranks: Ranks, cfg: Any, layer: str) -> dict[str, Any]:
    """Three updates; what the model holds, and the error that ended them."""
    network = Partly(layer)
    engine = engine_of(network, cfg, ranks)
    trainer = SharpnessAware.over(engine, cfg.method, ranks)
    for step in range(3):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        try:
            for micro in range(cfg.train.accumulate):
                images, labels = make_batch(ranks.rank, step, micro, torch.float32)
                micro_batch(trainer, Batch(images, labels), cfg, Moment(step), cfg.optim.lr)
        except UserError as error:
            params = {name: param.detach() for name, param in network.named_parameters()}
            return {"error": str(error), "moved": [n for n in params if not torch.equal(params[n], before[n])]}
        network.uses_other = False
    return dict(engine.state_dict()["model"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [{"name": "sgd"}, {"name": "sam"}, {"name": "recycled", "score": "random"}])
def test_a_layer_that_no_pass_uses_changes_no_bit_of_the_others_nor_its_own(
    two_ranks: Cluster, method: dict[str, Any], accumulate: int
) -> None:
    cfg = configuration(method, train={"accumulate": accumulate})
    without = two_ranks.run(train_partly, cfg, "absent")
    found = two_ranks.run(train_partly, cfg, "unused")
    assert_same_bits(found[0], found[1])
    other = Partly("unused").other.state_dict()
    assert_same_bits(found[0], without[0] | {f"other.{name}": value for name, value in other.items()})


def test_a_layer_that_only_the_first_update_uses_is_one_line_on_all_ranks_before_weights_move(
    two_ranks: Cluster,
) -> None:
    for found in two_ranks.run(train_partly, configuration({"name": "sgd"}), "used first"):
        assert found["error"].startswith("parameter other.weight has no part in this update's loss")
        assert found["moved"] == []
