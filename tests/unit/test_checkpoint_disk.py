"""Checkpoints on a disk that refuses: the old ones stay, and the next attempt finds room."""

import errno
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, read
from esam_dist.errors import CheckpointNotWrittenError, UserError
from tests.saved import state, steps, with_value


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@contextmanager
def mounted(folder, options):
    """A file system of its own at `folder`; needs root."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: not root, or a container without the right")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def large(step):
    return with_value(state(step), torch.zeros(50_000), "engine", "model", "weights")


def test_a_file_in_place_of_the_folder_is_one_line(checkpoints):
    checkpoints.folder.write_text("")
    with pytest.raises(UserError, match=r"checkpoints: cannot be read .*Not a directory"):
        checkpoints.newest()
    with pytest.raises(CheckpointNotWrittenError, match="File exists"):
        checkpoints.save(state(1), 1)
    assert checkpoints.folder.read_text() == ""


def test_what_reads_otherwise_than_it_was_written_takes_no_place(checkpoints, monkeypatch):
    checkpoints.save(state(1), 1)
    checkpoints = Checkpoints(checkpoints.folder, keep=1)
    fsync = os.fsync

    def flip_a_bit(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("state.pt"):
            os.pwrite(descriptor, b"x", 100)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flip_a_bit)
    with pytest.raises(CheckpointNotWrittenError, match="reads otherwise"):
        checkpoints.save(state(2), 2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]


def test_on_a_full_disk_the_old_ones_stay_and_the_next_attempt_finds_room(tmp_path):
    checkpoints = Checkpoints(tmp_path / "disk" / "checkpoints", keep=2)
    with mounted(tmp_path / "disk", "size=512k"):
        checkpoints.save(large(1), 1)
        checkpoints.save(large(2), 2)
        with pytest.raises(
            CheckpointNotWrittenError, match=r"step 3: cannot be written .*No space left.*step_00000002"
        ):
            checkpoints.save(large(3), 3)
        assert [read(path)["train"]["step"] for path in checkpoints.all()] == [1, 2]
        assert [path.name for path in checkpoints.folder.glob(".*")] == []
        shutil.rmtree(checkpoints.folder / "step_00000001")
        checkpoints.save(large(4), 4)
        assert [read(path)["train"]["step"] for path in checkpoints.all()] == [2, 4]


def test_a_disk_that_became_read_only_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "disk" / "checkpoints", keep=2)
    with mounted(tmp_path / "disk", "size=512k"):
        checkpoints.save(state(1), 1)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(CheckpointNotWrittenError, match="Read-only file system"):
            checkpoints.save(state(2), 2)
        assert checkpoints.newest()[1]["train"]["step"] == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")])
def test_whatever_the_disk_refuses_the_old_ones_stay(checkpoints, monkeypatch, owner, name, number):
    checkpoints.save(state(1), 1)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(CheckpointNotWrittenError, match=re.escape(os.strerror(number))):
        checkpoints.save(state(2), 2)
    monkeypatch.undo()
    assert steps(checkpoints) == [1]
    checkpoints.save(state(2), 2)
    assert checkpoints.newest()[1]["train"]["step"] == 2


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    checkpoints.save(state(1), 1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointNotWrittenError, match="No such file"):
        checkpoints.save(state(2), 2)
    assert not (tmp_path / "run").exists()


def test_an_old_one_that_cannot_be_removed_does_not_undo_the_new_one(checkpoints, monkeypatch, caplog):
    for step in (1, 2):
        checkpoints.save(state(step), step)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.save(state(3), 3)
    assert steps(checkpoints) == [2, 3]
    assert "cannot be removed" in caplog.text
