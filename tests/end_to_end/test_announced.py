"""What a run says: when it begins, when something is other than before, when it ends, and when it is stopped."""

import io
import logging
import os
import signal

import pytest

from esam_dist import announcements, cli, config, metrics
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from esam_dist.run_folder import Before
from tests.commands import here


@pytest.fixture
def told():
    """What is logged, as text."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream.getvalue
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def run(tiny, tmp_path):
    return ("train", tiny, f"run.folder={tmp_path / 'run'}", "train.log_every=1", "optim.warmup_epochs=0")


def test_a_run_says_what_it_trains_and_what_came_of_it(run, tmp_path, told):
    assert here(*run, "train.epochs=1").status == 0
    text = told()
    assert "cifar_resnet8 (0.08 M parameters) by esam on 1 rank of cpu (native, fp32); 80 images of 16 pixels" in text
    assert "8 images an update, peak rate 0.05; 10 steps" in text
    assert "finished after 10 steps: best validation accuracy 0." in text
    assert f"in {tmp_path / 'run/checkpoints/step_00000010'}; next: esam-dist evaluate {tmp_path / 'run'}" in text


def test_more_epochs_and_another_batch_are_announced_and_an_unchanged_run_is_not(run, told):
    assert here(*run, "train.epochs=1").status == 0
    assert here(*run, "train.epochs=2", "data.batch_size=4").status == 0
    assert "4 images an update instead of 8 images; optim.lr stays 0.05" in told()
    assert "train.epochs = 2 instead of 1: the schedule spans all epochs, so the rate jumps from 0 to 0.025" in told()


def test_an_interrupted_run_goes_on_unannounced(run, told):
    assert here(*run, "train.epochs=1", "train.max_steps=5").status == 0
    assert here(*run, "train.epochs=1").status == 0
    assert "instead of" not in told()
    assert "steps 6 to 10" in told()


def test_other_ranks_are_announced():
    cfg = config.Config()
    (change,) = announcements.changes(Before(cfg, 2), cfg, Ranks(world_size=3), Progress(step=1, samples=64), 600)
    assert "192 images (64 x 3 ranks) an update instead of 128 images (64 x 2 ranks)" in change


def test_a_finished_run_keeps_its_config_and_says_what_has_no_effect(run, few_digits, tmp_path, told):
    assert here(*run, "train.epochs=1").status == 0
    kept = [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "environment.json")]
    (tmp_path / "other").symlink_to(few_digits)
    assert here(*run, "train.epochs=1", f"data.path={tmp_path / 'other'}").status == 0
    assert [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "environment.json")] == kept
    assert f"without effect: data.path = {tmp_path / 'other'} (was {few_digits})" in told()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_is_answered_with_a_checkpoint_and_its_name(run, tmp_path, told, capfd, monkeypatch, number, status):
    progress = metrics.Metrics.progress

    def stop_at_three(self, steps):
        progress(self, steps)
        if steps == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.Metrics, "progress", stop_at_three)
    assert here(*run).status == status
    assert f"{number.name} received: stopping" in capfd.readouterr().err
    assert f"stopped by {number.name} at step " in told()
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert f"the checkpoint {newest} is written; the same command goes on from there" in told()


def test_ctrl_c_where_nothing_is_to_be_saved_is_one_line(monkeypatch):
    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.guide.models, "run", interrupted)
    answer = here("models")
    assert (answer.status, answer.err) == (130, "esam-dist: interrupted\n")
