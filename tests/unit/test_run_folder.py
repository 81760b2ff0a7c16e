"""The run folder: what it says of a run, and how it keeps two runs apart."""

import errno
import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from esam_dist import config
from esam_dist.config import Config
from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from esam_dist.run_folder import MAY_CHANGE, History, describe, note_not_finite, open_run_folder, read_history


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "first"


def configured(folder, *overrides):
    path = folder.parent.parent / "config.yaml"
    path.write_text("")
    return config.load(path, [f"run.folder={folder}", *overrides])


def begun(folder):
    """The folder of a run that has left a checkpoint."""
    open_run_folder(configured(folder), Ranks())
    (folder / "checkpoints").mkdir()
    return folder


def test_the_folder_holds_config_and_environment(folder):
    cfg = configured(folder, "train.epochs=3")
    assert open_run_folder(cfg, Ranks(world_size=2)) == folder
    assert config.load(folder / "config.yaml") == cfg
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == metadata.version("torch")
    assert environment["world_size"] == 2
    assert environment["device"] == "cpu"


def test_only_rank_0_writes(folder):
    open_run_folder(configured(folder), Ranks(rank=1, world_size=2))
    assert not folder.exists()


@pytest.mark.parametrize(
    "override", ["method.rho=0.1", "model.name=resnet18", "optim.lr=0.2", "run.seed=1", "data.image_size=16"]
)
def test_a_run_of_another_config_is_refused_by_key_and_both_values(folder, override):
    before = (begun(folder) / "config.yaml").read_text()
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=r"choose another run\.folder") as error:
        open_run_folder(configured(folder, override), Ranks())
    assert f"{key} = {config.flat(Config())[key]}, not {value}" in str(error.value)
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "override", ["train.epochs=40", "engine.name=deepspeed", "metrics.port=9100", "data.workers=0", "checkpoint.keep=5"]
)
def test_how_far_where_and_how_watched_may_change(folder, override):
    cfg = configured(begun(folder), override)
    before = (folder / "config.yaml").read_text()
    open_run_folder(cfg, Ranks())
    # Not before it is known that something is left to do.
    assert (folder / "config.yaml").read_text() == before
    describe(cfg, Ranks())
    key, _, value = override.partition("=")
    assert str(config.flat(config.load(folder / "config.yaml"))[key]) == value


def test_a_folder_without_checkpoints_is_free_for_another_config(folder):
    open_run_folder(configured(folder), Ranks())
    open_run_folder(configured(folder, "method.rho=0.1"), Ranks())


def test_every_start_is_counted_whether_or_not_the_one_before_left_a_checkpoint(folder):
    for starts in (1, 2):
        open_run_folder(configured(folder), Ranks(world_size=2))
        open_run_folder(configured(folder), Ranks(rank=1, world_size=2))
        assert read_history(folder) == History(starts=starts)
    note_not_finite(folder)
    (folder / "checkpoints").mkdir()
    open_run_folder(configured(folder, "train.epochs=99"), Ranks())
    assert read_history(folder) == History(starts=3, not_finite=1)


def test_another_run_in_the_folder_has_a_history_of_its_own(folder):
    open_run_folder(configured(folder), Ranks())
    note_not_finite(folder)
    open_run_folder(configured(folder, "method.rho=0.1"), Ranks())
    assert read_history(folder) == History(starts=1)


NO_HISTORIES = [
    *("", '{"starts": 3', "[]", '{"ends": 3}', '{"starts": "3"}', '{"starts": null}', '{"starts": -1}', "null", "3"),
    *(
        '{"starts": true}',
        '{"starts": 1.5}',
        '{"starts": [1]}',
        '{"not_finite": {}}',
        "[" * 1000,
        '{"starts": ' * 100_000,
    ),
]


@pytest.mark.parametrize("text", NO_HISTORIES, ids=range(len(NO_HISTORIES)))
def test_a_history_that_cannot_be_read_begins_anew_with_one_word(folder, text, caplog):
    open_run_folder(configured(folder), Ranks())
    (folder / "history.json").write_text(text)
    open_run_folder(configured(folder), Ranks())
    assert len(caplog.records) == 1
    assert "history.json: cannot be read" in caplog.text
    assert read_history(folder) == History(starts=1)


FILES = ["config.yaml", "environment.json", "history.json"]


@pytest.mark.parametrize("refused", FILES)
def test_a_full_disk_at_the_start_is_one_line_and_every_file_is_whole(folder, monkeypatch, refused):
    open_run_folder(configured(folder), Ranks())
    before = {name: (folder / name).read_text() for name in FILES}
    fsync = os.fsync

    def full(number):
        if Path(os.readlink(f"/proc/self/fd/{number}")).name.startswith(f".{refused}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        open_run_folder(configured(folder), Ranks())
    assert (folder / refused).read_text() == before[refused]
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_what_a_killed_start_left_is_cleared_away(folder):
    open_run_folder(configured(folder), Ranks())
    (folder / ".config.yaml.1234abcd.partial").write_text("run:")
    open_run_folder(configured(folder), Ranks())
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("text", ["", "\n", None])
def test_checkpoints_without_a_config_are_not_taken_for_those_of_another_run(folder, text):
    (begun(folder) / "checkpoints" / "step_00000001").mkdir()
    (folder / "config.yaml").unlink() if text is None else (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml is (empty|missing).*write it again") as error:
        open_run_folder(configured(folder, "method.rho=0.1"), Ranks())
    assert "method.rho" not in str(error.value)


def test_a_new_run_over_an_old_one_is_refused(folder):
    with pytest.raises(UserError, match=r"run.resume = never"):
        open_run_folder(configured(begun(folder), "run.resume=never"), Ranks())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.folder = .*file.* cannot be written"):
        open_run_folder(configured(tmp_path / "file" / "run"), Ranks())


def test_the_keys_that_may_change_exist():
    keys = {key.name for key in config.keys()}  # noqa: SIM118
    sections = {key.partition(".")[0] for key in keys}
    for key in MAY_CHANGE:
        assert key in keys or (key.endswith(".*") and Path(key).stem in sections), key
