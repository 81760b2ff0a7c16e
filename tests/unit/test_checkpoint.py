"""Checkpoints: complete or not there at all, whatever dies when."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, read
from esam_dist.errors import UserError


class Killed(BaseException):
    """What stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def state(step):
    return {"engine": {"weights": torch.full((3,), float(step))}, "train": {"step": step}}


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.all()]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_read_back(checkpoints):
    path = checkpoints.save(state(3), 3, accuracy=0.5)
    assert path.name == "step_00000003"
    assert read(path)["train"] == {"step": 3}
    assert torch.equal(read(path)["engine"]["weights"], state(3)["engine"]["weights"])
    assert json.loads((path / "metadata.json").read_text())["accuracy"] == 0.5


def test_no_checkpoint_at_all_is_a_new_run(checkpoints):
    assert checkpoints.newest() is None
    assert checkpoints.best() is None


def test_the_newest_is_found_by_number(checkpoints):
    for step in (9, 10):
        checkpoints.save(state(step), step)
    path, saved = checkpoints.newest()
    assert (path.name, saved["train"]["step"]) == ("step_00000010", 10)


def test_newest_and_best_are_kept(checkpoints):
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, 0.8), (6, None)):
        checkpoints.save(state(step), step, accuracy)
    assert steps(checkpoints) == [2, 5, 6]
    assert checkpoints.best().name == "step_00000002"


def test_of_equally_good_checkpoints_the_newest_is_best(checkpoints):
    for step in range(1, 5):
        checkpoints.save(state(step), step, accuracy=0.9)
    assert steps(checkpoints) == [3, 4]
    assert checkpoints.best().name == "step_00000004"


def die(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (os, "fsync"), (json, "dump"), (Path, "rename")])
def test_killed_before_the_rename_the_old_checkpoint_is_what_there_is(checkpoints, monkeypatch, owner, name):
    checkpoints.save(state(1), 1)
    monkeypatch.setattr(owner, name, die)
    with pytest.raises(Killed):
        checkpoints.save(state(2), 2)
    monkeypatch.undo()
    assert steps(checkpoints) == [1]
    assert checkpoints.newest()[1]["train"]["step"] == 1
    checkpoints.save(state(2), 2)
    assert steps(checkpoints) == [1, 2]
    assert not list(checkpoints.folder.glob(".partial_*"))


def test_killed_while_an_old_checkpoint_is_dropped_only_complete_ones_remain(checkpoints, monkeypatch):
    for step in (1, 2):
        checkpoints.save(state(step), step)
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        checkpoints.save(state(3), 3)
    monkeypatch.undo()
    assert [read(path)["train"]["step"] for path in checkpoints.all()] == [2, 3]


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(state(1), 1)
    path = checkpoints.save(state(1) | {"train": {"step": 1, "again": True}}, 1)
    assert read(path)["train"] == {"step": 1, "again": True}
    assert steps(checkpoints) == [1]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: damage(path / "state.pt"),
        lambda path: (path / "state.pt").write_bytes(b""),
        lambda path: (path / "state.pt").unlink(),
        lambda path: (path / "metadata.json").write_text("{"),
        lambda path: (path / "metadata.json").write_text("[]"),
        lambda path: (path / "metadata.json").write_text('{"step": 2, "accuracy": null}'),
    ],
    ids=["flipped bit", "emptied", "removed", "metadata cut off", "metadata no mapping", "no checksum"],
)
def test_a_damaged_checkpoint_is_passed_over(checkpoints, caplog, harm):
    for step in (1, 2):
        checkpoints.save(state(step), step)
    harm(checkpoints.folder / "step_00000002")
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert "step_00000002" in caplog.text
    with pytest.raises(UserError, match="use another checkpoint"):
        read(checkpoints.folder / "step_00000002")
    # What cannot be read must not stop the next one either.
    checkpoints.save(state(3), 3, accuracy=0.5)
    assert checkpoints.newest()[1]["train"]["step"] == 3
    assert checkpoints.best().name == "step_00000003"


def test_all_damaged_is_the_users_decision(checkpoints):
    for step in (1, 2):
        damage(checkpoints.save(state(step), step) / "state.pt")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoints.newest()


class Malice:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_refused_and_never_run(checkpoints, capsys):
    path = checkpoints.save({"engine": Malice()}, 1)
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path / "state.pt", weights_only=True)


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / path)
