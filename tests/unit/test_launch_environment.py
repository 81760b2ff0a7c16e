"""What a launcher tells a rank by its environment, and what none would tell: one line, and no training."""

import pytest
import torch

from esam_dist.errors import UserError
from esam_dist.ranks import Ranks
from tests.commands import here

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECOND_OF_TWO = dict(zip(NAMES, ("1", "2", "1", "node0", "29500"), strict=True))


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a launcher to those given, and to no others."""

    def be(values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return be


@pytest.mark.parametrize(
    ("values", "rank", "local_rank", "world_size"),
    [
        ({}, 0, 0, 1),
        # those of a Service of the name `master`, in any pod of its namespace
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, 0, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 0, 1),
        (SECOND_OF_TWO, 1, 1, 2),
        ({name: value for name, value in SECOND_OF_TWO.items() if name != "LOCAL_RANK"}, 1, 0, 2),
        (SECOND_OF_TWO | {"RANK": "9", "WORLD_SIZE": "16"}, 9, 1, 16),
    ],
)
def test_what_launchers_set_is_read(environment, values, rank, local_rank, world_size):
    environment(values)
    read = Ranks.from_environment()
    assert (read.rank, read.local_rank, read.world_size) == (rank, local_rank, world_size)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LOCAL_RANK"])
def test_one_that_is_missing_is_refused(environment, name):
    environment({other: value for other, value in SECOND_OF_TWO.items() if other != name})
    with pytest.raises(UserError, match=f"^{name} is (empty or )?not set"):
        Ranks.from_environment()


@pytest.mark.parametrize(("name", "value"), [("RANK", "0"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")])
def test_one_alone_is_refused(environment, name, value):
    environment({name: value})
    with pytest.raises(UserError, match=r"^(RANK|WORLD_SIZE) is not set, but others are that a launcher sets; start"):
        Ranks.from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NAMES if name != "MASTER_ADDR" for value in ("", " ", "two", "-1", "1.5", "1_0")),
        *((name, "9" * 5000) for name in NAMES if name != "MASTER_ADDR"),
        *(("RANK", value) for value in ("2", "\N{SUPERSCRIPT TWO}", "1\nline")),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        *(("MASTER_PORT", value) for value in ("0", "65536", "tcp://10.0.0.1:80")),
        *(("MASTER_ADDR", value) for value in ("", " ")),
    ],
)
def test_what_no_launcher_sets_is_one_line_that_names_it(environment, name, value):
    environment(SECOND_OF_TWO | {name: value})
    with pytest.raises(UserError, match=f"^{name} ") as caught:
        Ranks.from_environment()
    assert str(caught.value).isprintable()
    assert "unset RANK" in str(caught.value)


def test_more_ranks_than_gpus_on_a_node_are_refused(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment(SECOND_OF_TWO)
    with pytest.raises(UserError, match=r"^LOCAL_RANK = 1: this node has 1 GPUs; start no more ranks on it"):
        Ranks.from_environment()


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "-1"}, {"RANK": "first"}, {"RANK": "", "WORLD_SIZE": ""}])
def test_the_command_ends_with_status_2_and_that_line(environment, values, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    environment(values)
    answer = here("train", tiny, f"run.folder={tmp_path / 'run'}", "train.max_steps=1")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("esam-dist: error: ")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
