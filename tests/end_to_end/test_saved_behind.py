"""Checkpoints that are written while training goes on: signals and refusals in the middle of that."""

import os
import signal
import threading
import time

import pytest

from esam_dist import checkpoint, cli
from esam_dist.checkpoint import sealed
from tests.commands import TIMEOUT_SECONDS, here, on_ranks, rows

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

SHORT = ("train.epochs=2", "checkpoint.every_steps=5")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def at_read_back(monkeypatch, step, act):
    """Have `act` called when the checkpoint of `step` is written, and not yet read back."""
    sha256 = sealed.sha256

    def acting(path, *given):
        if path.parent.name == f".partial_step_{step:08d}":
            act()
        return sha256(path, *given)

    monkeypatch.setattr(sealed, "sha256", acting)


def until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_updates_are_made_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch):
    def wait_for_two_more_updates():
        until(lambda: rows(tmp_path)[-1]["step"] >= 7)

    at_read_back(monkeypatch, 5, wait_for_two_more_updates)
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT).status == 0
    assert [row["step"] for row in rows(tmp_path, "checkpoint")] == [5, 10, 15, 20]
    assert names(tmp_path) == [f"step_{step:08d}" for step in (5, 10, 15, 20)]


def test_all_wait_for_the_disk_where_that_is_asked_for(tiny, tmp_path, monkeypatch):
    seen = []
    at_read_back(monkeypatch, 5, lambda: (time.sleep(0.3), seen.append(rows(tmp_path)[-1]["step"])))
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT, "checkpoint.asynchronous=false").status == 0
    assert seen == [5]


def test_sigterm_while_a_checkpoint_is_written_ends_with_that_one_whole_and_its_own(tiny, tmp_path, monkeypatch):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    at_read_back(monkeypatch, 5, stop)
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT, "train.log_every=1000").status == 143
    last = rows(tmp_path)[-1]["step"]
    assert 5 < last < 20
    assert names(tmp_path) == ["step_00000005", f"step_{last:08d}"]
    monkeypatch.undo()
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT).status == 0


def test_second_ctrl_c_gives_up_the_one_that_is_written(tiny, tmp_path, monkeypatch):
    interrupted = threading.Event()

    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        interrupted.set()

    at_read_back(monkeypatch, 10, interrupt_twice)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cli.main(["train", str(tiny), f"run.folder={tmp_path}", *SHORT])
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert interrupted.is_set()
    assert names(tmp_path) == ["step_00000005"]
    assert not (tmp_path / "run.lock").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    monkeypatch.undo()
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT).status == 0


def test_error_of_training_waits_for_the_one_that_is_written(tiny, tmp_path, monkeypatch):
    at_read_back(monkeypatch, 5, lambda: time.sleep(1.0))
    step = checkpoint.Writer.begin

    def fail_soon(writer, state, number, accuracy):
        if number == 10:
            raise cli.UserError("spoilt on purpose")
        step(writer, state, number, accuracy)

    monkeypatch.setattr(checkpoint.Writer, "begin", fail_soon)
    assert here("train", tiny, f"run.folder={tmp_path}", *SHORT).status == 2
    assert names(tmp_path) == ["step_00000005"]


def test_checkpoints_by_the_minute_are_agreed_on_by_both_ranks(tiny, tmp_path):
    minutes = ("checkpoint.every_minutes=0.001", "train.epochs=6", "train.validate_every=9", "train.log_every=1000")
    answers = on_ranks("train", tiny, f"run.folder={tmp_path / 'run'}", *minutes)
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    steps = [row["step"] for row in rows(tmp_path / "run", "checkpoint")]
    assert [step for step in steps if step % 5], "not only those at the ends of epochs"
    assert steps == sorted(set(steps))
