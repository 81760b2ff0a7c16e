"""Checkpoints: complete or not there at all, whatever dies when."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, read
from esam_dist.errors import UserError
from tests.saved import state, steps


class Killed(BaseException):
    """What stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_what_is_saved_is_read_back(checkpoints):
    path = checkpoints.save(state(3), 3, accuracy=0.5)
    assert path.name == "step_00000003"
    assert read(path)["train"] == {"step": 3, "samples_seen": 24}
    assert torch.equal(read(path)["engine"]["model"]["weights"], state(3)["engine"]["model"]["weights"])
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


@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (os, "fsync"), (json, "dumps"), (Path, "rename")])
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
    path = checkpoints.save(state(1) | {"train": {"step": 1, "samples_seen": 9}}, 1)
    assert read(path)["train"] == {"step": 1, "samples_seen": 9}
    assert steps(checkpoints) == [1]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_a_step_is_replaced_one_of_the_two_is_there(checkpoints, monkeypatch, renames):
    checkpoints.save(state(1), 1)
    rename, left = Path.rename, [None] * renames

    def rename_or_die(path, target):
        if not left:
            raise Killed
        left.pop()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    with pytest.raises(Killed):
        checkpoints.save(state(1), 1)
    monkeypatch.undo()
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert len(checkpoints.all()) == 1
    checkpoints.save(state(2), 2)
    assert [read(path)["train"]["step"] for path in checkpoints.all()] == [1, 2]
    checkpoints.save(state(1), 1)
    checkpoints.save(state(3), 3)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_job_that_lost_its_folder_writes_nothing(tmp_path):
    def refuse():
        raise UserError("taken over")

    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, refuse)
    with pytest.raises(UserError, match="taken over"):
        checkpoints.save(state(1), 1)
    assert not checkpoints.folder.exists()
