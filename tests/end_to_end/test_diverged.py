"""Runs that must go on otherwise than they did: after a loss that is not finite, or with another optimizer."""

import json
import re
import shutil

import pytest
import torch

from esam_dist import cli
from tests.commands import TIMEOUT_SECONDS, here, on_ranks, rows

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

SHORT = ("train.epochs=2", "checkpoint.every_steps=5")
"""20 steps of one rank."""


def test_in_another_folder_a_run_goes_on_from_a_checkpoint_with_another_rate_and_then_from_its_own(tiny, tmp_path):
    run = ("train", tiny, f"run.folder={tmp_path / 'run'}", *SHORT)
    assert here(*run, "train.max_steps=5").status == 0
    # The folder keeps to its configuration, and says what to do instead.
    named = re.search(r"run\.resume=(\S+) ", here(*run, "optim.lr=0.01").err)[1]
    again = ("train", tiny, *SHORT, f"run.folder={tmp_path / 'new'}", f"run.resume={named}", "optim.lr=0.01")
    assert here(*again, "train.max_steps=7").status == 0
    assert [row["step"] for row in rows(tmp_path / "new")] == [6, 7]
    # By the same command it goes on from its own, not from where it began.
    assert here(*again, "train.max_steps=9").status == 0
    assert [row["step"] for row in rows(tmp_path / "new")] == [6, 7, 8, 9]
    assert rows(tmp_path / "new")[-1]["restarts"] == 1


def ended_after_damage(run: tuple, damage, monkeypatch):
    """The end of `run`, continued from its checkpoint with a model that was given to `damage` first."""
    assert here(*run, "train.max_steps=5").status == 0
    train = cli.train

    def damaged(training):
        with torch.no_grad():
            damage(training.trainer.engine.module)
        return train(training)

    with monkeypatch.context() as patched:
        patched.setattr(cli, "train", damaged)
        ended = here(*run)
    assert ended.status == 2
    return ended


def test_the_error_of_a_loss_that_is_not_finite_names_the_checkpoint_and_the_command(tiny, tmp_path, monkeypatch):
    def overflow(module):
        next(module.parameters()).fill_(float("inf"))

    ended = ended_after_damage(("train", tiny, f"run.folder={tmp_path / 'run'}", *SHORT), overflow, monkeypatch)
    newest = tmp_path / "run/checkpoints/step_00000005"
    assert f"add run.folder=NEW run.resume={newest} optim.lr=LOWER" in ended.err
    words = [f"run.folder={tmp_path / 'new'}", f"run.resume={newest}", "optim.lr=0.01"]
    assert here("train", tiny, *SHORT, *words, "train.max_steps=6").status == 0


def test_weights_that_are_not_finite_are_counted_like_a_loss_and_not_saved(tiny, tmp_path, monkeypatch):
    def spoil_a_statistic_that_nobody_reads_in_training(module):
        next(buffer for buffer in module.buffers() if buffer.is_floating_point()).fill_(float("nan"))

    run = ("train", tiny, f"run.folder={tmp_path / 'run'}", *SHORT)
    ended = ended_after_damage(run, spoil_a_statistic_that_nobody_reads_in_training, monkeypatch)
    assert re.search(
        r"running_mean is not finite at step 10, so that no checkpoint is written.*step_00000005", ended.err
    )
    assert json.loads((tmp_path / "run/history.json").read_text()) == {"starts": 2, "not_finite": 1}
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3)])
def test_a_run_without_momentum_continues_under_zero(tiny, tmp_path, stage):
    run = ("train", tiny, f"run.folder={tmp_path / 'run'}", "optim.momentum=0", "train.epochs=2")
    answers = on_ranks(*run, "train.max_steps=5")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    shutil.copytree(tmp_path / "run", tmp_path / "native")
    answers = on_ranks(*run, "engine.name=deepspeed", f"engine.zero_stage={stage}")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    answers = on_ranks(*run, f"run.folder={tmp_path / 'native'}")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("run", "native")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_of_another_optimizer_is_one_line(tiny, tmp_path):
    assert here("train", tiny, f"run.folder={tmp_path / 'run'}", "train.max_steps=1").status == 0
    ended = here(
        "train", tiny, f"run.folder={tmp_path / 'other'}", f"run.resume={tmp_path / 'run'}", "optim.name=adamw"
    )
    assert ended.status == 2
    assert "another optimizer (momentum_buffer) than optim.name = adamw" in ended.err
    assert ended.err.count("\n") == 1
