"""The package in somebody's own loop on two ranks: bare, in DDP and under DeepSpeed, against SAM written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_dist import SharpnessAware, methods
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from tests.by_hand import RHO, batch, losses, network, update, weights
from tests.multiprocess.cluster import Cluster

SAM = methods.SAM(rho=RHO)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def by_formula(accumulate: int, clip: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Each rank's own perturbation of each micro-batch, and the gradient averaged over all."""
    model = network(dtype=dtype)
    optimizer = sgd(model)
    for step in range(5):
        parts = [batch(step, micro, rank, dtype=dtype) for micro in range(accumulate) for rank in range(2)]
        update(model, optimizer, parts, clip=clip)
    return weights(model)


def assert_alike(ranks: list[Tensor]) -> None:
    assert torch.equal(ranks[0], ranks[1])


# Bare and in DDP


def train_ddp(ranks: Ranks, *, wrapped: bool, accumulate: int, clip: float) -> Tensor:
    model = network()
    optimizer = sgd(model)
    trainer = SharpnessAware(
        DistributedDataParallel(model) if wrapped else model,
        optimizer,
        SAM,
        accumulate=accumulate,
        clip_grad_norm=clip,
    )
    for step in range(5):
        for micro in range(accumulate):
            trainer.step(*batch(step, micro, ranks.rank), losses)
    return weights(model)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "ddp"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (2, 0.0), (2, 0.05)])
def test_five_steps_on_two_ranks_equal_the_formula(
    two_ranks: Cluster, wrapped: bool, accumulate: int, clip: float
) -> None:
    found = two_ranks.run(train_on, "ddp", {"wrapped": wrapped, "accumulate": accumulate, "clip": clip})
    assert_alike(found)
    torch.testing.assert_close(found[0], by_formula(accumulate, clip), rtol=1e-12, atol=1e-13)


def train_batchnorm(ranks: Ranks, *, method: methods.Method, forward_sync: bool) -> tuple[Tensor, Tensor]:
    """All that a replica holds, and the mean over ranks of each one's statistics after the first step."""
    model = network(batchnorm=True)
    # What DDP does by default, and its other way, under the name that this version has for it.
    ddp = DistributedDataParallel(model)
    if not forward_sync:
        ddp.broadcast_buffers = False
    trainer = SharpnessAware(ddp, sgd(model), method)
    trainer.step(*batch(0, 0, ranks.rank), losses)
    first = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
    for step in range(1, 5):
        trainer.step(*batch(step, 0, ranks.rank), losses)
    return torch.cat([value.double().flatten() for value in model.state_dict().values()]), first


@pytest.mark.parametrize("method", [SAM, methods.ESAM(rho=RHO), methods.SGD()], ids=lambda method: method.name)
@pytest.mark.parametrize("forward_sync", [True, False])
def test_replicas_with_batchnorm_end_identical_with_ddps_defaults_too(
    two_ranks: Cluster, method: methods.Method, forward_sync: bool
) -> None:
    found = two_ranks.run(train_on, "batchnorm", {"method": method, "forward_sync": forward_sync})
    assert_alike([state for state, _ in found])


@pytest.mark.parametrize("forward_sync", [True, False])
def test_batchnorm_statistics_are_rank_0s_by_ddps_default_and_the_mean_over_ranks_without(
    two_ranks: Cluster, forward_sync: bool
) -> None:
    found = two_ranks.run(train_on, "batchnorm", {"method": SAM, "forward_sync": forward_sync})
    each = []
    for rank in range(2):
        model = network(batchnorm=True)
        model(batch(0, 0, rank)[0])
        each.append(torch.cat([buffer.double().flatten() for buffer in model.buffers()]))
    expected = each[0] if forward_sync else torch.stack(each).mean(0)
    torch.testing.assert_close(found[0][1], expected, rtol=1e-12, atol=1e-13)


def record_dropout(ranks: Ranks) -> Tensor:
    model, dropped = network(dropout=0.5), []
    model[2].register_forward_hook(lambda module, given, out: dropped.append(out == 0.0))
    before = torch.get_rng_state()
    SharpnessAware(model, sgd(model), SAM).step(*batch(0), losses)
    assert torch.equal(torch.get_rng_state(), before)
    return dropped[0]


def test_dropout_differs_between_ranks_that_were_seeded_alike(two_ranks: Cluster) -> None:
    masks = two_ranks.run(train_on, "dropout", {})
    assert not torch.equal(*masks)


# DeepSpeed


def initialized(model: nn.Module, stage: int = 1, accumulate: int = 1, clip: float = 0.0, **more: Any) -> Any:
    """As a user would call it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    zero = {"stage": stage} | more.pop("zero", {})
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = more.pop("optimizer", sgd)(model)
        ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | more)
    return ds


def train_deepspeed(ranks: Ranks, *, stage: int, accumulate: int, clip: float) -> Tensor:
    model = network(dtype=torch.float32)
    trainer = SharpnessAware(initialized(model, stage, accumulate, clip), None, SAM)
    for step in range(5):
        for micro in range(accumulate):
            trainer.step(*batch(step, micro, ranks.rank, dtype=torch.float32), losses)
    assert trainer.updates == 5
    return weights(model)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (2, 0.05)])
def test_five_steps_under_deepspeed_equal_the_formula(
    two_ranks: Cluster, stage: int, accumulate: int, clip: float
) -> None:
    found = two_ranks.run(train_on, "deepspeed", {"stage": stage, "accumulate": accumulate, "clip": clip})
    assert_alike(found)
    torch.testing.assert_close(found[0].double(), by_formula(accumulate, clip), rtol=2e-5, atol=2e-6)


def train_groups(ranks: Ranks) -> Tensor:
    model = network(dtype=torch.float32)
    trainer = SharpnessAware(initialized(model, accumulate=2), None, methods.SAM(rho=RHO, group_size=4))
    for step in range(5):
        trainer.step(*batch(step, 0, ranks.rank, dtype=torch.float32), losses)
    return weights(model)


def test_groups_of_a_batch_are_deepspeeds_micro_batches(two_ranks: Cluster) -> None:
    found = two_ranks.run(train_on, "groups", {})
    model = network()
    optimizer = sgd(model)
    for step in range(5):
        whole = [batch(step, 0, rank) for rank in range(2)]
        halves = [slice(4), slice(4, 8)]
        update(model, optimizer, [(inputs[half], labels[half]) for inputs, labels in whole for half in halves])
    torch.testing.assert_close(found[0].double(), weights(model), rtol=2e-5, atol=2e-6)


def train_msam(ranks: Ranks, *, stage: int, kind: str) -> tuple[list[float], Tensor]:
    """With two groups of parameters; the sharpness of each step, and the weights."""
    model = network(dtype=torch.float32)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.01)

    method = methods.ESAM(rho=RHO, beta=1.0, gamma=0.5, direction="momentum", scope="rank")
    if stage < 0:
        trainer = SharpnessAware(model, optimizer(model), method)
    else:
        trainer = SharpnessAware(initialized(model, stage, optimizer=optimizer), None, method)
    stats = [trainer.step(*batch(step, 0, ranks.rank, dtype=torch.float32), losses) for step in range(4)]
    return [float(stat.sharpness) for stat in stats], weights(model)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_under_deepspeed_the_momentum_is_there_from_the_first_step_on(
    two_ranks: Cluster, stage: int, kind: str
) -> None:
    theirs = two_ranks.run(train_on, "msam", {"stage": stage, "kind": kind})
    ours = two_ranks.run(train_on, "msam", {"stage": -1, "kind": kind})
    for rank in range(2):
        assert theirs[rank][0][0] == 0.0
        assert all(rise != 0.0 for rise in ours[rank][0][1:])
        torch.testing.assert_close(theirs[rank][0], ours[rank][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(theirs[rank][1], ours[rank][1], rtol=2e-4, atol=2e-5)


# Mistakes


def unequal_batches(ranks: Ranks) -> None:
    model = network()
    SharpnessAware(model, sgd(model), SAM).step(*batch(0, size=8 - ranks.rank), losses)


def in_a_part_of_the_ranks(ranks: Ranks) -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][ranks.rank]
    model = network()
    SharpnessAware(DistributedDataParallel(model, process_group=alone), sgd(model), SAM)


def synced_batchnorm(ranks: Ranks) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(batchnorm=True))
    SharpnessAware(model, sgd(model), methods.ESAM())


def under_deepspeed(
    *, method: methods.Method = SAM, options: dict[str, Any] | None = None, steps: int = 0, **settings: Any
) -> Callable[[Ranks], None]:
    def make(ranks: Ranks) -> None:
        ds = initialized(network(dtype=torch.float32), **settings)
        trainer = SharpnessAware(ds, None, method, **(options or {}))
        for step in range(steps):
            trainer.step(*batch(step, dtype=torch.float32), losses)

    return make


def with_an_optimizer_of_its_own(ranks: Ranks) -> None:
    model = network(dtype=torch.float32)
    SharpnessAware(initialized(model), sgd(model), SAM)


WHOLE = {"stage3_param_persistence_threshold": 0}
MISTAKES: dict[str, tuple[Callable[[Ranks], None], str]] = {
    "unequal": (unequal_batches, "[8, 7] samples"),
    "subgroup": (in_a_part_of_the_ranks, "DDP over 1 of 2 ranks"),
    "SyncBatchNorm": (synced_batchnorm, "SyncBatchNorm"),
    "accumulate": (under_deepspeed(options={"accumulate": 2}), "gradient_accumulation_steps"),
    "clip": (under_deepspeed(options={"clip_grad_norm": 1.0}), "gradient_clipping"),
    "scaler": (under_deepspeed(options={"scaler": torch.amp.GradScaler("cpu")}), "scaler"),
    "bf16": (under_deepspeed(bf16={"enabled": True}), "16 bits"),
    "torch_autocast": (under_deepspeed(torch_autocast={"enabled": True, "dtype": "bfloat16"}), "torch_autocast"),
    "optimizer": (with_an_optimizer_of_its_own, "deepspeed.initialize"),
    "groups": (under_deepspeed(method=methods.SAM(group_size=4), steps=1), "gradient_accumulation_steps = 2"),
    "looksam": (under_deepspeed(method=methods.LookSAM(), accumulate=2, steps=1), "train.accumulate = 1"),
    "no momentum": (
        under_deepspeed(
            method=methods.MSAM(), optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), steps=1
        ),
        "momentum > 0",
    ),
    "zero3 part": (under_deepspeed(method=methods.ESAM(), stage=3, zero=WHOLE), "draw some of the weights"),
    "zero3 memory": (under_deepspeed(method=methods.LookSAM(), stage=3, zero=WHOLE), "remember a vector"),
    "zero3 whole": (under_deepspeed(stage=3), "stage3_param_persistence_threshold = 0"),
    "zero3 accumulate": (under_deepspeed(stage=3, accumulate=2, zero=WHOLE), "gradient_accumulation_steps = 1"),
}


def message_of(ranks: Ranks, *, mistake: str) -> str:
    with pytest.raises(UserError) as raised:
        MISTAKES[mistake][0](ranks)
    return str(raised.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_every_rank(two_ranks: Cluster, mistake: str) -> None:
    messages = two_ranks.run(train_on, "mistake", {"mistake": mistake})
    for message in messages:
        assert MISTAKES[mistake][1] in message
        assert "\n" not in message


TASKS: dict[str, Callable[..., Any]] = {
    "ddp": train_ddp,
    "batchnorm": train_batchnorm,
    "dropout": record_dropout,
    "deepspeed": train_deepspeed,
    "groups": train_groups,
    "msam": train_msam,
    "mistake": message_of,
}


def train_on(ranks: Ranks, task: str, how: dict[str, Any]) -> Any:
    """One of `TASKS`, with keywords."""
    return TASKS[task](ranks, **how)
