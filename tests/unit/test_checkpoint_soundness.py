"""Checkpoints that are broken, not finite or no checkpoints: passed over in one line each, and never run."""

import pickle
import re
import shutil

import pytest
import torch

from esam_dist.checkpoint import Checkpoints, read
from esam_dist.errors import LossNotFiniteError, StateNotFiniteError, UserError
from esam_dist.soundness import SCALER
from tests.saved import damage, sealed, state, steps, with_value, without


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


NOT_FINITE = {
    "a weight": lambda value: with_value(state(2), torch.tensor([0.0, value]), "engine", "model", "weights"),
    "a buffer": lambda value: with_value(state(2), torch.tensor(value), "engine", "model", "running_var"),
    "momentum": lambda value: with_value(
        state(2), torch.tensor([value]), "engine", "optimizer", "weights", "momentum_buffer"
    ),
    "half": lambda value: with_value(state(2), torch.tensor([value]).half(), "engine", "model", "weights"),
    "scale": lambda value: with_value(state(2), dict.fromkeys(SCALER, 1) | {"scale": value}, "engine", "scaler"),
    "memory": lambda value: with_value(state(2), {"flat": [torch.zeros(2), torch.tensor([value])]}, "method"),
    "average": lambda value: with_value(state(2), {"weights": {"one": torch.tensor([value])}}, "average"),
}


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
