"""The commands as a user meets them, in this process."""

import pytest
import yaml

from esam_dist import __version__, config
from tests.commands import here


def test_version():
    assert here("--version").out.strip() == __version__


def test_help_names_every_command():
    answer = here("--help")
    assert answer.status == 0
    for command in ("train", "config", "evaluate", "prepare"):
        assert command in answer.out


@pytest.mark.parametrize("args", [[], ["fly"], ["train"], ["config"], ["prepare", "mnist", "out"]])
def test_misuse_shows_the_usage_and_exits_2(args):
    answer = here(*args)
    assert answer.status == 2
    assert "usage: esam-dist" in answer.err


def test_config_prints_what_would_run_and_can_be_read_back(tiny, tmp_path):
    answer = here("config", tiny, "train.epochs=4")
    assert answer.status == 0
    (tmp_path / "printed.yaml").write_text(answer.out)
    assert config.load(tmp_path / "printed.yaml") == config.load(tiny, ["train.epochs=4"])
    assert yaml.safe_load(answer.out)["train"]["epochs"] == 4


def test_config_check_says_valid(tiny):
    assert here("config", tiny, "--check") == (0, "valid\n", "")


def test_changes_may_stand_on_both_sides_of_an_option(tiny):
    assert here("config", tiny, "train.epochs=4", "--check", "optim.lr=0.2") == (0, "valid\n", "")
    assert "train.epochs" in here("config", tiny, "--check", "train.epoch=4").err
    assert "unrecognized arguments: --chek" in here("config", tiny, "--chek", "train.epochs=4").err


def test_config_check_of_a_fault_is_one_line_and_status_2(tiny):
    answer = here("config", tiny, "train.epoch=4", "--check")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert "train.epochs" in answer.err


def test_deepspeeds_local_rank_is_taken_and_ignored(tiny):
    assert here("--local_rank=1", "config", tiny, "--check").status == 0


def test_the_second_rank_names_itself_after_the_first_had_time_to_speak(tiny, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    answer = here("config", tiny, "train.epoch=4")
    assert answer.err.startswith("esam-dist: error: rank 1: ")
    assert slept
