"""Checkpoints written behind training: one at a time, whole or not at all, and every outcome told."""

import shutil
import threading
import weakref

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, Writer, sealed
from esam_dist.errors import CheckpointNotWrittenError, StateNotFiniteError
from tests.saved import state


@pytest.fixture
def writer(tmp_path):
    return Writer(Checkpoints(tmp_path / "checkpoints", keep=2))


class Gate:
    """`sealed.sha256`, which waits until it is opened: a disk that is slow when the checkpoint is read back."""

    def __init__(self, monkeypatch):
        self.reached, self.opened, self.sha256 = threading.Event(), threading.Event(), sealed.sha256
        monkeypatch.setattr(sealed, "sha256", self)

    def __call__(self, *args):
        self.reached.set()
        assert self.opened.wait(20)
        return self.sha256(*args)


def outcomes(writer):
    writer.wait()
    found = []
    while (outcome := writer.next_ended()) is not None:
        found.append(outcome)
    return found


def test_training_goes_on_while_a_checkpoint_is_written(writer, monkeypatch):
    gate = Gate(monkeypatch)
    writer.begin(state(1), 1, None)
    assert gate.reached.wait(20)
    assert writer.next_ended() is None
    assert writer.checkpoints.all() == []
    gate.opened.set()
    (outcome,) = outcomes(writer)
    assert (outcome.step, outcome.error) == (1, None)
    assert outcome.seconds > 0.0
    assert [path.name for path in writer.checkpoints.all()] == ["step_00000001"]


def test_a_second_one_waits_for_the_first_and_outcomes_keep_their_order(writer, monkeypatch):
    gate = Gate(monkeypatch)
    writer.begin(state(1), 1, 0.5)
    second = threading.Thread(target=writer.begin, args=(state(2), 2, 0.25))
    second.start()
    assert gate.reached.wait(20)
    second.join(0.2)
    assert second.is_alive()
    assert [path.name for path in writer.checkpoints.folder.iterdir()] == [".partial_step_00000001"]
    gate.opened.set()
    second.join(20)
    assert [outcome.step for outcome in outcomes(writer)] == [1, 2]
    assert writer.checkpoints.best().name == "step_00000001"


def test_an_older_one_stays_until_the_newer_one_is_read_back(tmp_path, monkeypatch):
    writer = Writer(Checkpoints(tmp_path / "checkpoints", keep=1))
    writer.begin(state(1), 1, None)
    writer.wait()
    gate = Gate(monkeypatch)
    writer.begin(state(2), 2, None)
    assert gate.reached.wait(20)
    assert (tmp_path / "checkpoints" / "step_00000001" / "state.pt").exists()
    assert [path.name for path in writer.checkpoints.all()] == ["step_00000001"]
    gate.opened.set()
    writer.wait()
    assert [path.name for path in writer.checkpoints.all()] == ["step_00000002"]


def test_a_refused_one_is_told_and_the_next_is_tried(writer, tmp_path):
    writer.checkpoints.folder.write_text("in the way")
    writer.begin(state(1), 1, None)
    writer.wait()
    writer.checkpoints.folder.unlink()
    writer.begin(state(2), 2, None)
    first, second = outcomes(writer)
    assert isinstance(first.error, CheckpointNotWrittenError)
    assert second.error is None


def test_what_is_not_finite_is_told(writer):
    spoilt = state(1)
    spoilt["engine"]["model"]["weights"][0] = torch.nan
    writer.begin(spoilt, 1, None)
    (outcome,) = outcomes(writer)
    assert isinstance(outcome.error, StateNotFiniteError)
    assert not writer.checkpoints.folder.exists()


def test_a_fault_of_ours_is_told_with_its_traceback(writer, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "rmtree", lambda path: 1 / 0)
    monkeypatch.setattr(sealed, "write", lambda *args: 1 / 0)
    writer.begin(state(1), 1, None)
    (outcome,) = outcomes(writer)
    assert type(outcome.error) is RuntimeError
    assert "ZeroDivisionError" in str(outcome.error)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("place", ["written", "read back"])
def test_one_that_is_given_up_leaves_nothing_and_all_others(writer, monkeypatch, place):
    writer.begin(state(1), 1, None)
    writer.wait()
    reached, opened = threading.Event(), threading.Event()
    owner, name = (sealed.Hashed, "write") if place == "written" else (sealed, "sha256")
    original = getattr(owner, name)

    def slow(*args):
        reached.set()
        assert opened.wait(20)
        return original(*args)

    monkeypatch.setattr(owner, name, slow)
    writer.begin(state(2), 2, None)
    assert reached.wait(20)
    giving_up = threading.Thread(target=writer.give_up)
    giving_up.start()
    opened.set()
    giving_up.join(20)
    assert not giving_up.is_alive()
    assert [path.name for path in writer.checkpoints.folder.iterdir()] == ["step_00000001"]
    assert writer.checkpoints.newest()[1]["train"]["step"] == 1


def test_the_copy_is_let_go_when_it_is_written(writer):
    content = state(1)
    kept = weakref.ref(content["engine"]["model"]["weights"])
    writer.begin(content, 1, None)
    del content
    writer.wait()
    assert kept() is None
