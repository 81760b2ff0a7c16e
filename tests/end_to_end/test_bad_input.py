"""What a user can get wrong: one line that names it, exit status 2, no traceback, and before any rank waits."""

import json
import shutil
import socket
from contextlib import closing

import pytest

from tests.commands import alone, here


@pytest.fixture
def start(tiny, tmp_path):
    """Start to train into a folder of the test's own."""
    return lambda *overrides: here("train", tiny, f"run.folder={tmp_path / 'run'}", "train.max_steps=1", *overrides)


@pytest.fixture
def data(few_digits, tmp_path):
    return shutil.copytree(few_digits, tmp_path / "data")


@pytest.fixture
def trained(start, tmp_path):
    """The folder of a run with one checkpoint."""
    assert start().status == 0
    return tmp_path / "run"


def assert_refused(answer, *words):
    assert answer.status == 2, answer
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("esam-dist: error: ")
    assert len(lines[0]) < 1000  # with samples that it names, and the paths of this test
    for word in words:
        assert word in lines[0]


def test_missing_data_folder(start, tmp_path):
    assert_refused(start(f"data.path={tmp_path / 'nowhere'}"), "data.path", "nowhere", "esam-dist prepare")


def test_folder_that_is_no_dataset(start, tmp_path):
    assert_refused(start(f"data.path={tmp_path}"), "data.path", "dataset.json", "esam-dist prepare")


def test_damaged_description(start, data):
    (data / "dataset.json").write_text("{")
    assert_refused(start(f"data.path={data}"), "data.path", "damaged")


def test_only_norms_of_a_network_without_any(start):
    assert_refused(
        start("method.swp=norm", "model.name=alexnet", "data.image_size=64"),
        "method.swp = norm",
        "alexnet",
        "method.swp = tensor",
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_shard(start, data, split):
    (data / split / "shard-000000.tar").write_bytes(b"")
    assert_refused(start(f"data.path={data}"), "data.path", "shard-000000", "prepare the data again")


def test_shard_without_samples(start, data):
    index = data / "train" / "shard-000000.index"
    info = json.loads(index.read_bytes().partition(b"\n")[0])
    index.write_bytes(json.dumps(info | {"samples": 0}).encode() + b"\n")
    assert_refused(start(f"data.path={data}"), "data.path", "shard-000000.index")


def test_split_without_shards(start, data):
    description = json.loads((data / "dataset.json").read_text())
    del description["splits"]["validation"]
    (data / "dataset.json").write_text(json.dumps(description))
    assert_refused(start(f"data.path={data}"), "data.path", "validation")


def test_missing_config(tmp_path):
    assert_refused(here("train", tmp_path / "nowhere.yaml"), "nowhere.yaml", "cannot be read")


def test_wrong_yaml_type(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {epochs: many}\n")
    assert_refused(here("train", path), "train.epochs = 'many'")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["unknown key", "'train.epoch'", "train.epochs"]),
        ("method.beta=0", ["method.beta = 0", "(0, 1]"]),
        ("method.beta=1.5", ["method.beta = 1.5", "(0, 1]"]),
        ("method.gamma=-0.1", ["method.gamma = -0.1", "(0, 1]"]),
        ("method.gamma=[[0,1],[3,7]]", ["method.gamma = [[0, 1], [3, 7]]", "7 is out of range", "(0, 1]"]),
        ("train.epochs", ["section.key=value"]),
        ("model.name=resnet_50", ["model.name = 'resnet_50'", "resnet50"]),
        ("model.num_classes=4", ["model.num_classes = 4", "10 classes"]),
        ("model.num_classes=12 data.mixup=0.2", ["model.num_classes = 12", "data.mixup = 0"]),
        ("metrics.bind=no.such.host.invalid", ["metrics.bind = no.such.host.invalid"]),
    ],
)
def test_refused_value(start, override, words):
    extra = ["metrics.port=9400"] if "bind" in override else []
    assert_refused(start(*override.split(" "), *extra), *words)


def test_more_ranks_than_samples(start, monkeypatch):
    # A rank that went on to meet the 99 others would wait for half an hour.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert_refused(start("data.batch_size=1"), "100 ranks", "80", "fewer ranks")


def test_batch_larger_than_the_data_names_the_largest_that_fits(start):
    assert_refused(start("data.batch_size=81"), "data.batch_size = 81", "at most 80")


def test_port_taken(start):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(start(f"metrics.port={port}"), f"metrics.port = {port}", "metrics.port=0")


def test_all_checkpoints_damaged(start, trained):
    for state in trained.rglob("state.pt"):
        state.write_bytes(b"not a checkpoint")
    assert_refused(start("train.max_steps=2"), "run.resume = auto", "none of the 1 checkpoints")


def test_unreadable_checkpoint_asked_for_by_path(start, tmp_path):
    assert_refused(start(f"run.resume={tmp_path / 'nowhere'}"), "run.resume", "nowhere", "no such checkpoint")


def test_checkpoint_of_another_network(start, trained, tmp_path, tiny):
    path = next((trained / "checkpoints").iterdir())
    answer = here("train", tiny, f"run.folder={tmp_path / 'other'}", f"run.resume={path}", "model.name=cifar_resnet20")
    assert_refused(answer, str(path), "cifar_resnet20")


def test_run_folder_of_another_config(start, trained):
    assert_refused(start("method.rho=0.3"), "run.folder", "method.rho = 0.05, not 0.3", "choose another run.folder")


def test_run_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(here("train", tiny, f"run.folder={tmp_path / 'file' / 'run'}"), "run.folder", "choose another")


def test_loss_that_is_not_finite_stops_the_run_says_why_and_is_counted(start, tmp_path):
    for ends in (1, 2):
        answer = start("optim.lr=1e30", "optim.warmup_epochs=0", "train.max_steps=40")
        assert_refused(answer, "not finite", "lower optim.lr")
        assert json.loads((tmp_path / "run/history.json").read_text()) == {"starts": ends, "not_finite": ends}


def test_evaluate_without_a_run(tmp_path):
    assert_refused(here("evaluate", tmp_path), "config.yaml")


@pytest.mark.parametrize("command", [("evaluate",), ("export",), ("predict", "image.png")])
def test_a_run_that_is_not_there_is_said_to_be_not_there_with_those_that_are(trained, command):
    name, *rest = command
    key = "MODEL" if name == "predict" else "RUN"
    assert_refused(
        here(name, trained.with_name("ran"), *rest), f"{key} = ", "ran: no such folder", f"(there are {trained})"
    )
    assert_refused(here(name, trained.parent, *rest), f"{key} = ", "no run's folder")
    assert_refused(here(name, trained, *rest, "--checkpoint", "77"), "no such checkpoint; there are step_00000001")


def test_evaluate_of_a_checkpoint_says_how_to_name_it(trained):
    path = trained / "checkpoints/step_00000001"
    assert_refused(here("evaluate", path), "is a checkpoint", str(trained), "--checkpoint step_00000001")


def test_evaluate_without_a_checkpoint(trained):
    shutil.rmtree(trained / "checkpoints")
    assert_refused(here("evaluate", trained), "no checkpoint")


def test_in_a_process_of_its_own_nothing_else_is_said(tiny, tmp_path):
    answer = alone("train", tiny, "method.bta=0.5", f"run.folder={tmp_path / 'run'}")
    assert_refused(answer, "method.beta")
    assert answer.out == ""
    assert not (tmp_path / "run").exists()
