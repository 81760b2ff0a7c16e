"""Checkpoints: complete or not there at all, whatever dies when."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, read
from esam_dist.checksum import sha256
from esam_dist.errors import CheckpointNotWrittenError, LossNotFiniteError, StateNotFiniteError, UserError
from esam_dist.soundness import SCALER


class Killed(BaseException):
    """What stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def state(step):
    weights = {"weights": torch.full((3,), float(step)), "seen": torch.tensor(step)}
    momentum = {"weights": {"momentum_buffer": torch.ones(3)}}
    return {"engine": {"model": weights, "optimizer": momentum}, "train": {"step": step, "samples_seen": 8 * step}}


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.all()]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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


def sealed(folder, step, content):
    """A checkpoint of `content` whose checksum fits: what an older or another program might have left."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    torch.save(content, path / "state.pt")
    (path / "metadata.json").write_text(
        json.dumps({"step": step, "accuracy": 0.9, "sha256": sha256(path / "state.pt")})
    )
    return path


def without(content, *keys):
    part = content
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return content


def with_value(content, value, *keys):
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return content


AVERAGE = {"kind": "ema", "updates": 1, "statistics": {}}
NOT_FINITE = {
    "a weight": lambda value: with_value(state(2), torch.tensor([0.0, value]), "engine", "model", "weights"),
    "a buffer": lambda value: with_value(state(2), torch.tensor(value), "engine", "model", "running_var"),
    "momentum": lambda value: with_value(
        state(2), torch.tensor([value]), "engine", "optimizer", "weights", "momentum_buffer"
    ),
    "half": lambda value: with_value(state(2), torch.tensor([value]).half(), "engine", "model", "weights"),
    "scale": lambda value: with_value(state(2), dict.fromkeys(SCALER, 1) | {"scale": value}, "engine", "scaler"),
    "memory": lambda value: with_value(state(2), {"flat": [torch.zeros(2), torch.tensor([value])]}, "method"),
    "average": lambda value: with_value(state(2), {**AVERAGE, "copies": [{"one": torch.tensor([value])}]}, "average"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", NOT_FINITE)
def test_what_is_not_finite_is_never_written(checkpoints, part, value):
    checkpoints.save(state(1), 1)
    with pytest.raises(StateNotFiniteError, match=r"is not finite at step 2.*run\.resume=.*step_00000001") as error:
        checkpoints.save(NOT_FINITE[part](value), 2)
    assert isinstance(error.value, LossNotFiniteError)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", NOT_FINITE)
def test_what_is_not_finite_on_the_disk_is_passed_over_by_name(checkpoints, caplog, part, value):
    checkpoints.save(state(1), 1)
    sealed(checkpoints.folder, 2, NOT_FINITE[part](value))
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert re.search("step_00000002.*is not finite", caplog.text)
    assert len(caplog.records) == 1


UNSOUND = {
    "no mapping": lambda: [1, 2],
    "nothing": lambda: {},
    "no engine": lambda: without(state(2), "engine"),
    "no weights": lambda: without(state(2), "engine", "model"),
    "no optimizer": lambda: without(state(2), "engine", "optimizer"),
    "no train": lambda: without(state(2), "train"),
    "no step": lambda: without(state(2), "train", "step"),
    "no samples": lambda: without(state(2), "train", "samples_seen"),
    "engine a number": lambda: with_value(state(2), 3, "engine"),
    "a weight that is text": lambda: with_value(state(2), "w", "engine", "model", "weights"),
    "momentum a list": lambda: with_value(state(2), [1.0], "engine", "optimizer", "weights"),
    "a step below zero": lambda: with_value(state(2), -1, "train", "step"),
    "a step that is text": lambda: with_value(state(2), "2", "train", "step"),
    "a scale without its rule": lambda: with_value(state(2), {"scale": 1.0}, "engine", "scaler"),
    "method a number": lambda: with_value(state(2), 3, "method"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_a_sealed_checkpoint_without_its_parts_is_passed_over_in_one_line(checkpoints, caplog, kind):
    checkpoints.save(state(1), 1, accuracy=0.5)
    sealed(checkpoints.folder, 2, UNSOUND[kind]())
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert len(caplog.records) == 1
    assert "step_00000002" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    # It claims the best accuracy, and is not the best.
    assert checkpoints.best().name == "step_00000001"


@pytest.mark.parametrize("text", ["[" * 1000, '{"sha256": ' * 1000, "[" * 100_000, "\xff", "null", '{"sha256": 3}'])
def test_metadata_of_any_kind_is_one_line(checkpoints, caplog, text):
    for step in (1, 2):
        checkpoints.save(state(step), step)
    (checkpoints.folder / "step_00000002" / "metadata.json").write_text(text, encoding="latin-1")
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert len(caplog.records) == 1
    checkpoints.save(state(3), 3, accuracy=0.1)
    assert checkpoints.best().name == "step_00000003"


def test_a_checkpoint_without_metadata_is_named(checkpoints, caplog):
    for step in (1, 2):
        checkpoints.save(state(step), step)
    (checkpoints.folder / "step_00000002" / "metadata.json").unlink()
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert re.search("passed over.*step_00000002.*metadata.json: No such file", caplog.text)


def test_none_but_one_without_metadata_is_no_new_run(checkpoints):
    (checkpoints.save(state(1), 1) / "metadata.json").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        checkpoints.newest()


def test_what_is_no_checkpoint_is_named_and_left_alone(checkpoints, caplog):
    checkpoints.save(state(1), 1)
    strays = ["step_foo", ".partial_x", "step_7", "notes", "step_00000009"]
    for name in strays[:2]:
        (checkpoints.folder / name).mkdir()
    for name in strays[2:]:
        (checkpoints.folder / name).write_text("mine")
    (checkpoints.folder / ".partial_step_00000003").write_text("ours, left by a kill")
    assert checkpoints.newest()[1]["train"]["step"] == 1
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in strays)
    checkpoints.save(state(2), 2)
    assert steps(checkpoints) == [1, 2]
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step_00000001", "step_00000002", *strays}


def test_a_file_in_place_of_the_folder_is_one_line(checkpoints):
    checkpoints.folder.write_text("")
    with pytest.raises(UserError, match=r"checkpoints: cannot be read .*Not a directory"):
        checkpoints.newest()
    with pytest.raises(CheckpointNotWrittenError, match="File exists"):
        checkpoints.save(state(1), 1)
    assert checkpoints.folder.read_text() == ""


def test_a_broken_checkpoint_counts_for_none_of_those_that_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(state(1), 1)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
    damage(checkpoints.save(state(5), 5) / "state.pt")
    shutil.copytree(tmp_path / "copy", tmp_path / "checkpoints", dirs_exist_ok=True)
    assert checkpoints.newest()[1]["train"]["step"] == 1
    checkpoints.save(state(2), 2)
    checkpoints.save(state(3), 3)
    # The newest is kept, though there is one with a higher number; the broken one waits for its successor.
    assert [read(path)["train"]["step"] for path in checkpoints.all()[:-1]] == [3]
    for step in (4, 5, 6):
        checkpoints.save(state(step), step)
    assert [read(path)["train"]["step"] for path in checkpoints.all()] == [6]


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


def test_a_job_that_lost_its_folder_writes_nothing(tmp_path):
    def refuse():
        raise UserError("taken over")

    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, refuse)
    with pytest.raises(UserError, match="taken over"):
        checkpoints.save(state(1), 1)
    assert not checkpoints.folder.exists()


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
