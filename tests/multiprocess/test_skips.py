"""An update whose averaged gradient is not finite: skipped on all ranks, counted, and the end of a run after many."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from esam_dist import SharpnessAware, methods
from esam_dist.checkpoint import read
from esam_dist.data import Batch
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.soundness import not_finite
from esam_dist.step import Moment
from esam_dist.train import micro_batch
from tests.commands import TIMEOUT_SECONDS, here, on_ranks, rows
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import CLASSES, configuration, engine_of, make_batch, make_network
from tests.multiprocess.test_training import assert_same_bits

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

ENGINES = {
    "native": {"name": "native"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
WHERE = ["alone", *ENGINES]
OPTIMIZERS = {
    "sgd": {"lr": 0.1},
    "nesterov": {"lr": 0.1, "nesterov": True, "clip_grad_norm": 0.3},
    "adamw": {"name": "adamw", "lr": 0.01},
}


def with_a_bad_batch(ranks: Ranks, cfg: Any, bad: int) -> list[tuple[dict[str, Any], float, float]]:
    """The state after each of four updates, whether it was skipped, and whether a loss of this rank was not finite."""
    classifier = Classifier(make_network(torch.float32), cfg.train.precision)
    trainer = SharpnessAware.over(engine_of(classifier, cfg, ranks), cfg.method, ranks)
    taken = [(trainer.engine.state_dict(), 0.0, 0.0)]
    for step in range(4):
        for micro in range(cfg.train.accumulate):
            images, labels = make_batch(ranks.rank, step, micro, torch.float32)
            if step == bad and micro == 0 and ranks.rank == ranks.world_size - 1:
                images[2, 1, 3, 3] = torch.nan
            stats = micro_batch(trainer, Batch(images, labels), cfg, Moment(step), cfg.optim.lr)
        taken.append((trainer.engine.state_dict(), float(stats.skipped_update), float(stats.not_finite)))
    return taken


def bad_batch_on(request: pytest.FixtureRequest, engine: str, cfg: Any, bad: int) -> list[Any]:
    if engine == "alone":
        return [with_a_bad_batch(Ranks(), cfg, bad)]
    return request.getfixturevalue("two_ranks").run(with_a_bad_batch, cfg, bad)


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(
    ("engine", "optimizer", "method"),
    [
        *((engine, "sgd", {"name": "sgd"}) for engine in WHERE),
        *((engine, "nesterov", {"name": "sam"}) for engine in ("alone", "native", "zero0", "zero2")),
        *((engine, "adamw", {"name": "sgd"}) for engine in ("alone", "native", "zero0", "zero1")),
        ("native", "sgd", {"name": "gsam"}),
    ],
)
def test_a_batch_that_is_not_finite_on_one_rank_changes_no_bit_of_weights_momentum_and_statistics(
    request: pytest.FixtureRequest, engine: str, optimizer: str, method: dict[str, Any], bad: int
) -> None:
    keys = {"engine": ENGINES["native" if engine == "alone" else engine], "optim": OPTIMIZERS[optimizer]}
    ranks = bad_batch_on(request, engine, configuration(method, **keys), bad)
    for rank, taken in enumerate(ranks):
        assert [skipped for _, skipped, _ in taken[1:]] == [float(step == bad) for step in range(4)]
        assert taken[bad + 1][2] == float(rank == len(ranks) - 1)
        (before, *_), (after, *_) = taken[bad : bad + 2]
        changed = [name for name in before["model"] if not torch.equal(after["model"][name], before["model"][name])]
        # BatchNorm counts batches, and the ranks' statistics move where they are sound; the first layer's are not.
        assert all("num_batches" in name or "running" in name for name in changed)
        for name, entries in after["optimizer"].items():
            earlier = before["optimizer"].get(name, {})
            for key, value in entries.items():
                assert torch.equal(value, earlier.get(key, torch.zeros_like(value))), (name, key)
        assert not_finite(taken[-1][0]) is None
        assert not torch.equal(taken[-1][0]["model"]["network.head.weight"], after["model"]["network.head.weight"])
    for left, right in zip(*(ranks * 2)[:2], strict=True):
        assert_same_bits(left[0], right[0])


def test_an_update_is_skipped_for_a_bad_micro_batch_that_is_not_its_last(two_ranks: Cluster) -> None:
    cfg = configuration({"name": "sgd"}, train={"accumulate": 2})
    for taken in two_ranks.run(with_a_bad_batch, cfg, 1):
        assert [skipped for _, skipped, _ in taken] == [0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"fused": True, "dampening": 0.1}])
def test_anyones_optimizer_and_its_scheduler_are_left_alone_too(options: dict[str, Any]) -> None:
    network = make_network(torch.float32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer = SharpnessAware(network, optimizer, methods.SAM())
    states = []
    for step in range(3):
        images, labels = make_batch(0, step, 0, torch.float32)
        images = images * torch.nan if step == 0 else images
        stats = trainer.step(images, labels, lambda out, y: torch.nn.functional.cross_entropy(out, y, reduction="none"))
        scheduler.step()
        assert float(stats.skipped_update) == float(step == 0)
        states.append({name: param.detach().clone() for name, param in network.named_parameters()})
    assert_same_bits(states[0], dict(make_network(torch.float32).named_parameters()))
    assert not_finite(states[2]) is None
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_with_the_channels_innermost_are_updated_by_their_own_gradients(
    layout: torch.memory_format, name: str
) -> None:
    """GSAM's mixed gradients, and momentum from a checkpoint, may lie in memory in another order than the weights."""
    cfg = configuration({"name": "gsam"}, optim={"name": name, "lr": 0.01})
    network = make_network(torch.float64).to(memory_format=layout)
    trainer = SharpnessAware.over(engine_of(Classifier(network, "fp32"), cfg, Ranks()), cfg.method, Ranks())
    for step in range(4):
        micro_batch(trainer, Batch(*make_batch(0, step, 0, torch.float64)), cfg, Moment(step), cfg.optim.lr)
        state = trainer.engine.state_dict()
        contiguous = {
            key: {name: value.contiguous() for name, value in entries.items()}
            for key, entries in state["optimizer"].items()
        }
        trainer.engine.load_state_dict(state | {"optimizer": contiguous})
    reference = make_network(torch.float64)
    plain = SharpnessAware(
        reference,
        torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=1e-3)
        if name == "adamw"
        else torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3),
        cfg.method,
    )
    for step in range(4):
        plain.step(*make_batch(0, step, 0, torch.float64), losses, moment=Moment(step))
    for param, value in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=1e-6, atol=1e-7)


def losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert outputs.shape[1] == CLASSES
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


# By the command line

ONCE = "method.rho=[[0, 0.05], [1, 1e25], [1.15, 0.05]]"
"""At the first update of the second epoch, of five, the perturbed weights overflow."""
COMMAND = {"native": ["engine.name=native"]} | {
    f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(3)
}


def run_on(count: int, *args: object) -> Any:
    """Rank 0's answer; all end alike."""
    answers = [here(*args)] if count == 1 else on_ranks(*args, count=count)
    assert len({answer.status for answer in answers}) == 1, [answer.err for answer in answers]
    return answers[0]


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        *(("native", 1), ("native", 2)),
        *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("zero0", "zero1", "zero2")),
    ],
)
def test_a_run_that_skips_an_update_ends_finite_and_equals_itself_interrupted_before_and_behind(
    tiny, tmp_path, engine: str, count: int
) -> None:
    run = ("train", tiny, *COMMAND[engine], f"data.batch_size={16 // count}", ONCE)
    assert run_on(count, *run, f"run.folder={tmp_path / 'whole'}", "train.max_steps=9").status == 0
    for last in (5, 6, 9):
        assert run_on(count, *run, f"run.folder={tmp_path / 'parts'}", f"train.max_steps={last}").status == 0
    whole, parts = (read(tmp_path / name / "checkpoints/step_00000009") for name in ("whole", "parts"))
    assert_same_bits(parts["engine"], whole["engine"])
    assert parts["train"] == whole["train"]
    assert not_finite(whole) is None
    for name in ("whole", "parts"):
        assert [row["skipped_updates"] for row in rows(tmp_path / name)] == [0, 0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        *(("native", 1), ("native", 2)),
        *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("zero0", "zero1", "zero2")),
    ],
)
def test_a_run_that_only_skips_ends_with_its_cause_and_the_last_checkpoint(
    tiny, tmp_path, engine: str, count: int
) -> None:
    keys = (f"data.batch_size={16 // count}", "method.rho=[[0, 0.05], [1, 1e25]]", "train.max_skipped_updates=2")
    ended = run_on(count, "train", tiny, *COMMAND[engine], f"run.folder={tmp_path / 'run'}", *keys)
    assert ended.status == 2
    assert re.search(
        r"3 updates in a row until step 8 had a gradient that is not finite \(train.max_skipped_updates = 2\), the "
        r"first at step 6 \(samples 80 to 95 of the run\), where the loss(es)? of .*; rank \d had "
        r"\S*shard-00000\d.tar:\d{6}.png, .* more samples \(\S*skipped_batch.json\): lower optim.lr \(now 0.0\d+\) or "
        rf"method.rho \(now 1e\+25\); .* run.resume={tmp_path}/run/checkpoints/step_00000005 ",
        ended.err,
    ), ended.err
    assert json.loads((tmp_path / "run/history.json").read_text())["not_finite"] == 1
    batch = json.loads((tmp_path / "run/skipped_batch.json").read_text())
    assert batch["step"] == 6
    assert {rank: len(set(keys)) for rank, keys in batch["samples"].items()} == {
        str(rank): 16 // count for rank in range(count)
    }
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000005"]
    assert [row["skipped_updates"] for row in rows(tmp_path / "run")] == [0] * 5 + [1] * 3


@pytest.mark.parametrize(
    ("engine", "count"), [("native", 1), ("native", 2), pytest.param("zero1", 2, marks=pytest.mark.slow)]
)
def test_weights_that_explode_end_the_run_at_once_where_no_update_may_be_skipped(
    tiny, tmp_path, engine: str, count: int
) -> None:
    keys = ("optim.lr=1e3", "optim.warmup_epochs=0", "train.max_skipped_updates=0", "checkpoint.every_steps=1")
    plain = ("method.phase={from: 0.99, to: 1}", "optim.schedule=constant", "train.epochs=30")
    ended = run_on(count, "train", tiny, *COMMAND[engine], f"run.folder={tmp_path / 'run'}", *keys, *plain)
    assert ended.status == 2
    assert re.search(r"1 updates in a row until step \d+ .*run.resume=.*/step_\d+ optim.lr=LOWER", ended.err), ended.err
    skipped = [row["skipped_updates"] for row in rows(tmp_path / "run")]
    assert skipped == [0] * (len(skipped) - 1) + [1]


def test_a_series_of_skipped_updates_goes_on_through_a_restart(tiny, tmp_path) -> None:
    keys = ("method.rho=[[0, 0.05], [1, 1e25]]", "train.max_skipped_updates=3", "data.batch_size=16")
    run = ("train", tiny, f"run.folder={tmp_path / 'run'}", *keys)
    assert here(*run, "train.max_steps=7").status == 0
    assert read(tmp_path / "run/checkpoints/step_00000007")["train"]["skipped_in_a_row"] == 2
    ended = here(*run)
    assert ended.status == 2
    assert "4 updates in a row until step 9 " in ended.err
