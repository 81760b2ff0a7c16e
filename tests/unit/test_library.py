"""The package in somebody's own loop: against SAM written by hand, and what is said where something does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esam_dist import SharpnessAware, methods
from esam_dist.errors import UserError
from esam_dist.step import StepStats
from tests.by_hand import RHO, batch, losses, network, update, weights
from tests.commands import environment

SAM = methods.SAM(rho=RHO)


def sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(trainer: SharpnessAware, steps: int, accumulate: int = 1, first: int = 0, **kind: Any) -> list[StepStats]:
    return [
        trainer.step(*batch(step, micro, **kind), losses)
        for step in range(first, first + steps)
        for micro in range(accumulate)
    ]


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", [lambda model: sgd(model, 0.0), sgd, adam])
def test_five_steps_of_sam_equal_those_by_hand(optimizer: Any, accumulate: int, clip: float) -> None:
    ours, theirs = network(), network()
    trainer = SharpnessAware(ours, optimizer(ours), SAM, accumulate=accumulate, clip_grad_norm=clip)
    train(trainer, 5, accumulate)
    by_them = optimizer(theirs)
    for step in range(5):
        update(theirs, by_them, [batch(step, micro) for micro in range(accumulate)], clip=clip)
    assert not torch.equal(weights(theirs), weights(network()))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-13)
    assert trainer.updates == 5


def test_groups_of_a_batch_make_one_update_with_a_perturbation_each() -> None:
    ours, theirs = network(), network()
    trainer = SharpnessAware(ours, sgd(ours), methods.SAM(rho=RHO, group_size=4), accumulate=2)
    train(trainer, 5, accumulate=2)
    optimizer = sgd(theirs)
    for step in range(5):
        halves = [(half, micro) for micro in range(2) for half in (slice(4), slice(4, 8))]
        update(theirs, optimizer, [(batch(step, micro)[0][h], batch(step, micro)[1][h]) for h, micro in halves])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-13)


def test_msam_climbs_along_the_first_moment_of_adam() -> None:
    ours, theirs = network(), network()
    trainer, optimizer = SharpnessAware(ours, adam(ours), methods.MSAM(rho=RHO)), adam(theirs)
    train(trainer, 5)
    params = list(theirs.parameters())
    for step in range(5):
        moments = [optimizer.state[p]["exp_avg"] if step else torch.zeros_like(p) for p in params]
        norm = torch.cat([moment.flatten() for moment in moments]).norm()
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param, moment in zip(params, moments, strict=True):
                param.sub_(RHO * moment / norm if step else 0.0)
        inputs, labels = batch(step)
        losses(theirs(inputs), labels).mean().backward()
        with torch.no_grad():
            for param, weight in zip(params, before, strict=True):
                param.copy_(weight)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-13)


def test_batchnorm_statistics_move_once_and_at_the_unperturbed_weights() -> None:
    ours, plain = network(batchnorm=True), network(batchnorm=True)
    trainer = SharpnessAware(ours, sgd(ours), SAM)
    train(trainer, 1)
    plain(batch(0)[0])
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name


# GradScaler

FLOAT32 = {"dtype": torch.float32}


def test_float16_with_a_scaler_on_the_cpu_trains_as_float32_does() -> None:
    ours, theirs = network(**FLOAT32), network(**FLOAT32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer = SharpnessAware(ours, sgd(ours), SAM, scaler=scaler, autocast=torch.float16, clip_grad_norm=0.5)
    stats = train(trainer, 5, **FLOAT32)
    optimizer = sgd(theirs)
    for step in range(5):
        update(theirs, optimizer, [batch(step, **FLOAT32)], clip=0.5)
    moved = weights(theirs) - weights(network(**FLOAT32))
    assert (weights(ours) - weights(theirs)).norm() < 2**-8 * moved.norm()
    # Unscaled: a norm of the gradient, not of 1,024 times the gradient.
    assert all(stat.grad_norm < 10.0 for stat in stats)
    assert scaler.get_scale() == 2.0**10


def test_an_overflow_costs_one_update_and_halves_the_scale() -> None:
    model = network(**FLOAT32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer = SharpnessAware(model, sgd(model), SAM, scaler=scaler, autocast=torch.float16)
    before = weights(model)
    train(trainer, 1, **FLOAT32)
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("method", [SAM, methods.ESAM(score="forward"), methods.GSAM(rho=RHO)])
def test_a_step_inside_an_autocast_of_the_callers_is_the_step_with_autocast(method: methods.Method) -> None:
    inside, told = network(**FLOAT32), network(**FLOAT32)
    trainer = SharpnessAware(inside, sgd(inside), method)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            trainer.step(*batch(step, **FLOAT32), losses)
    train(SharpnessAware(told, sgd(told), method, autocast=torch.bfloat16), 3, **FLOAT32)
    assert torch.equal(weights(inside), weights(told))


# Inputs of any structure


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    """The network of `by_hand`, with its features spread over arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, left: Tensor, right: Any, flag: bool = True, nothing: None = None) -> dict[str, Tensor]:
        assert flag
        rest = right["rest"][0] if isinstance(right, dict) else right
        return {"logits": self.network(torch.cat([left, rest], dim=1))}


def structures(inputs: Tensor) -> dict[str, Any]:
    left, right = inputs[:, :2], inputs[:, 2:]
    nested = {"left": left, "right": {"rest": [right]}, "flag": True, "nothing": None}
    return {
        "dict": nested,
        "mapping": UserDict(nested),
        "tuple": (left, {"rest": (right,)}),
        "named": Pair(left, right),
    }


@pytest.mark.parametrize("kind", ["dict", "mapping", "tuple", "named"])
@pytest.mark.parametrize("scope", ["rank", "global"])
def test_nested_inputs_train_as_one_tensor_does(kind: str, scope: str) -> None:
    method = methods.ESAM(rho=RHO, gamma=0.5, scope=scope)
    plain, ours = network(), Structured()
    one, nested = SharpnessAware(plain, sgd(plain), method), SharpnessAware(ours, sgd(ours), method)
    for step in range(3):
        inputs, labels = batch(step)
        one.step(inputs, labels, losses)
        targets = {"labels": (labels,)}
        nested.step(structures(inputs)[kind], targets, lambda out, wanted: losses(out["logits"], wanted["labels"][0]))
    assert torch.equal(weights(ours), weights(plain))


# Randomness


@pytest.mark.parametrize("method", [SAM, methods.ESAM(score="random"), methods.SGD()])
def test_a_step_leaves_the_callers_random_state_alone_and_dropout_differs_from_step_to_step(method: Any) -> None:
    model = network(dropout=0.5)
    dropped: list[Tensor] = []
    model[2].register_forward_hook(lambda module, given, out: dropped.append(out == 0.0))
    trainer = SharpnessAware(model, torch.optim.SGD(model.parameters(), lr=0.0), method)
    first = []
    for _ in range(4):
        dropped.clear()
        before = torch.get_rng_state()
        trainer.step(*batch(0), losses)
        assert torch.equal(torch.get_rng_state(), before)
        first.append(dropped[0])
    assert all(mask.any() and not mask.all() for mask in first)
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


# Resuming


@pytest.mark.parametrize(
    "method",
    [
        methods.LookSAM(rho=RHO, interval=3),
        methods.ESAM(rho=RHO, beta=1.0, direction="average"),
        methods.ESAM(rho=RHO, score="random", phase={"from": 0.5, "to": 1.0}),
    ],
)
def test_training_resumed_from_state_dict_equals_no_interruption_to_the_bit(method: Any, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.SGD, SharpnessAware]:
        model = network(dropout=0.2)
        optimizer = sgd(model)
        return model, optimizer, SharpnessAware(model, optimizer, method, total_updates=8, seed=3)

    whole, _, trainer = start()
    train(trainer, 8)
    model, optimizer, trainer = start()
    train(trainer, 4)
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")

    model, optimizer, trainer = start()
    saved = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    trainer.load_state_dict(saved["trainer"])
    train(trainer, 4, first=4)
    assert torch.equal(weights(model), weights(whole))


def test_nothing_grows_with_the_steps() -> None:
    model = network()
    trainer = SharpnessAware(model, sgd(model), SAM)
    train(trainer, 3)
    assert trainer.clock.drain() == {}


# What is said where something does not fit


class Empty(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def trainer_of(method: Any = SAM, model: nn.Module | None = None, **options: Any) -> SharpnessAware:
    model = model or network()
    optimizer = options.pop("optimizer", sgd)
    return SharpnessAware(model, optimizer and optimizer(model), method, **options)


def stepped(method: Any = SAM, size: int = 8, **options: Any) -> StepStats:
    return trainer_of(method, **options).step(*batch(0, size=size), losses)


def step_with(loss: Any) -> StepStats:
    return trainer_of().step(*batch(0), loss)


def smaller_batch_follows() -> None:
    trainer = trainer_of(methods.SAM(group_size=4))
    train(trainer, 1)
    train(trainer, 1, first=1, size=4)


def save_within_an_update() -> None:
    trainer = trainer_of(accumulate=2)
    trainer.step(*batch(0), losses)
    trainer.state_dict()


def phase(start: float) -> dict[str, float]:
    return {"from": start, "to": 1.0}


MISTAKES: dict[str, tuple[Any, str]] = {
    "no parameters": (lambda: SharpnessAware(Empty(), None, SAM), "Empty has no parameters"),
    "all frozen": (lambda: SharpnessAware(frozen(), None, SAM), "requires_grad"),
    "sparse": (lambda: trainer_of(model=nn.Embedding(3, 2, sparse=True)), "sparse=False"),
    "no optimizer": (lambda: trainer_of(optimizer=None), "optimizer = None"),
    "another's optimizer": (lambda: trainer_of(optimizer=lambda _: sgd(network())), "none of the model's parameters"),
    "a class": (lambda: trainer_of(methods.SAM), "instance of esam_dist.methods"),
    "a name": (lambda: trainer_of("sam"), "instance of esam_dist.methods"),
    "unknown option": (lambda: trainer_of(accumulation=2), "did you mean 'accumulate'"),
    "accumulate": (lambda: trainer_of(accumulate=0), "accumulate = 0"),
    "clip": (lambda: trainer_of(clip_grad_norm=-1.0), "clip_grad_norm = -1.0"),
    "autocast": (lambda: trainer_of(autocast=True), "autocast = True"),
    "rho": (lambda: methods.SAM(rho=-1.0), "methods.SAM: rho = -1.0"),
    "key": (lambda: methods.ESAM(tau=0.5), "no key 'tau'"),
    "kind": (lambda: methods.ESAM(score="best"), "score = 'best'"),
    "phase": (lambda: trainer_of(methods.SAM(phase=phase(0.5))), "total_updates=N"),
    "schedule": (lambda: trainer_of(methods.SAM(rho=[[0, 0.1], [2, 0.2]])), "updates_per_epoch=N"),
    "mean loss": (lambda: step_with(F.cross_entropy), 'reduction="none"'),
    "a number": (lambda: step_with(lambda out, labels: losses(out, labels).mean().item()), "loss_fn returned float"),
    "loss per class": (lambda: step_with(lambda out, labels: out), "shape [8, 3] for 8 samples"),
    "fewer targets": (lambda: trainer_of().step(batch(0)[0], batch(0)[1][:7], losses), "shape [7]"),
    "fewer inputs": (lambda: trainer_of().step(*batch(0, size=0), losses), "batch of 0 samples"),
    "unlike inputs": (lambda: trainer_of().step((torch.ones(8, 6), torch.ones(5, 5)), None, losses), "shape [5, 5]"),
    "no tensor": (lambda: trainer_of().step({"text": "a"}, None, losses), "inputs of type dict"),
    "group size": (lambda: stepped(methods.SAM(group_size=3)), "does not divide"),
    "group scope": (lambda: stepped(methods.ESAM(group_size=4)), "method.scope = rank"),
    "smaller batch": (smaller_batch_follows, "drop_last=True"),
    "looksam": (lambda: stepped(methods.LookSAM(interval=2), accumulate=2), "train.accumulate = 1"),
    "no momentum": (lambda: stepped(methods.MSAM(), optimizer=lambda m: sgd(m, 0.0)), "momentum > 0"),
    "head": (lambda: trainer_of(methods.ESAM(score="head"), nn.Conv1d(2, 2, 1)), "method.score = head"),
    "no norms": (lambda: trainer_of(methods.ESAM(swp="norm")), "method.swp = norm"),
    "state within": (save_within_an_update, "1 micro-batches of an update"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(mistake: str) -> None:
    make, words = MISTAKES[mistake]
    with pytest.raises(UserError) as raised:
        make()
    message = str(raised.value)
    assert words in message
    assert "\n" not in message


def test_weights_are_restored_when_the_loss_raises_at_the_perturbed_ones() -> None:
    model, calls = network(), []

    def failing(out: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the loss")
        return losses(out, labels)

    trainer = SharpnessAware(model, sgd(model), SAM)
    before = weights(model)
    with pytest.raises(RuntimeError, match="in the loss"):
        trainer.step(*batch(0), failing)
    assert torch.equal(weights(model), before)


# What is imported


def run(code: str, *args: object) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_package_alone_imports_neither_torch_nor_pydantic_in_no_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import esam_dist; took = time.perf_counter() - start; "
        "print(took, *{'torch', 'pydantic', 'numpy', 'deepspeed'} & set(sys.modules))"
    )
    seconds, *heavy = run(code).split()
    assert heavy == []
    assert float(seconds) < 0.5


def test_the_library_loads_no_deepspeed_and_nothing_of_images() -> None:
    heavy = "{'deepspeed', 'torchvision', 'cv2', 'webdataset', 'sklearn', 'prometheus_client'}"
    code = f"import sys; from esam_dist import SharpnessAware, methods; print(*{heavy} & set(sys.modules))"
    assert run(code).split() == []


def test_native_training_by_the_command_loads_no_deepspeed(tiny: Path, tmp_path: Path) -> None:
    code = """
import sys
from esam_dist.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded" if "deepspeed" in sys.modules else "not loaded")
"""
    out = run(code, "train", tiny, f"run.folder={tmp_path / 'run'}", "train.max_steps=2")
    assert out.split()[-2:] == ["not", "loaded"]


def test_the_names_that_the_package_offers_are_there() -> None:
    import esam_dist

    assert sorted(esam_dist.__all__) == ["SharpnessAware", "__version__", "methods"]
    assert all(hasattr(esam_dist, name) for name in esam_dist.__all__)
