"""A stop is noticed within an update, within a validation, and at once while there is nothing to save."""

import json
import os
import signal
import time

import pytest
import torch

from esam_dist import cli
from esam_dist.checkpoint import read
from esam_dist.data.loader import TrainData, ValidationData
from esam_dist.engine import native
from tests.commands import TIMEOUT_SECONDS, here, rows

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

SHORT = ("train.epochs=2", "checkpoint.every_steps=5")


def stop_myself():
    os.kill(os.getpid(), signal.SIGTERM)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_stop_is_noticed_within_one_slow_update_however_seldom_metrics_are_due(tiny, tmp_path, monkeypatch):
    step, made = native.NativeEngine.step, []

    def slow(engine, lr):
        time.sleep(0.15)
        made.append(None)
        if len(made) == 3:
            stop_myself()
        return step(engine, lr)

    monkeypatch.setattr(native.NativeEngine, "step", slow)
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT, "train.log_every=1000").status == 143
    assert len(made) == 3
    assert names(tmp_path) == ["step_00000003"]
    assert [row["step"] for row in rows(tmp_path)] == [3]


def test_a_validation_that_a_stop_ended_is_made_up_for_and_the_run_is_the_same(tiny, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert here("train", tiny, f"run.folder={whole}", *SHORT).status == 0
    batches, yielded = ValidationData.batches, []

    def stop_in_the_first(data):
        for batch in batches(data):
            time.sleep(0.15)
            yielded.append(None)
            if len(yielded) == 1:
                stop_myself()
            yield batch

    monkeypatch.setattr(ValidationData, "batches", stop_in_the_first)
    assert here("train", tiny, f"run.folder={stopped}", *SHORT).status == 143
    assert len(yielded) == 1, "of three batches"
    assert rows(stopped, "validation") == []
    first = rows(whole, "validation")[0]["step"]
    assert rows(stopped)[-1]["step"] == first
    newest = stopped / f"checkpoints/step_{first:08d}"
    assert json.loads((newest / "metadata.json").read_text())["accuracy"] is None
    monkeypatch.undo()
    assert here("train", tiny, f"run.folder={stopped}", *SHORT).status == 0
    accuracies = [[(row["step"], row["accuracy"]) for row in rows(run, "validation")] for run in (whole, stopped)]
    assert accuracies[0] == accuracies[1]
    assert json.loads((newest / "metadata.json").read_text())["accuracy"] == accuracies[0][0][1]
    models = [read(run / "checkpoints/step_00000020")["engine"]["model"] for run in (whole, stopped)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_stop_in_the_last_validation_is_143_and_the_next_start_ends_the_run(tiny, tmp_path, monkeypatch):
    batches = ValidationData.batches

    def stop_in_it(data):
        for batch in batches(data):
            stop_myself()
            yield batch

    monkeypatch.setattr(ValidationData, "batches", stop_in_it)
    run = ("train", tiny, f"run.folder={tmp_path}", "train.epochs=1")
    assert here(*run).status == 143
    assert rows(tmp_path, "validation") == []
    monkeypatch.undo()
    assert here(*run).status == 0
    assert [row["step"] for row in rows(tmp_path, "validation")] == [10]
    assert here(*run).status == 0
    assert len(rows(tmp_path, "validation")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["index", "network", "first batch"])
def test_before_there_is_something_to_save_a_stop_ends_the_process_at_once(tiny, tmp_path, monkeypatch, place, number):
    after = []

    def stopping(function):
        def stopped(*args, **kwargs):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            after.append(place)
            return function(*args, **kwargs)

        return stopped

    owner, name = {
        "index": (cli, "open_train"),
        "network": (cli, "build_network"),
        "first batch": (TrainData, "batches"),
    }[place]
    monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    assert here("train", tiny, f"run.folder={tmp_path / 'run'}").status == 128 + number
    assert after == []
    assert not (tmp_path / "run" / "run.lock").exists()
    assert not list(tmp_path.glob("run/checkpoints/*"))
    monkeypatch.undo()
    assert here("train", tiny, f"run.folder={tmp_path / 'run'}", "train.max_steps=1").status == 0
