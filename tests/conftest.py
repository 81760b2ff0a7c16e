"""What the tests share: prepared digits, and a run as small as can be."""

import os
import shutil
from pathlib import Path

# Before torch is imported: two ranks on two cores are slower with more threads, and sums depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml

from esam_dist.data.prepare import prepare_digits
from esam_dist.data.prepare.digits import Digits
from esam_dist.data.prepare.write import Plan, write_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards; read only."""
    root = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(root)
    return root


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits for one test to damage."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))


class FewDigits(Digits):
    """80 digits to train on and 23 to validate: five steps of two ranks by eight, and a set that does not divide."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.labels = {"train": self.labels["train"][:80], "validation": self.labels["validation"][:23]}


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few digits as shards; read only."""
    root = tmp_path_factory.mktemp("data") / "few_digits"
    write_dataset(FewDigits(), root, Plan(samples_per_shard=40))
    return root


@pytest.fixture(scope="session")
def tiny(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that takes a second, 20 steps on two ranks; `run.folder` is for the test to choose."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    sections = {
        "data": {"path": str(few_digits), "batch_size": 8, "workers": 0, "image_size": 16},
        "train": {"epochs": 4, "log_every": 1},
        "optim": {"lr": 0.05},
        "method": {"beta": {"from": 1.0, "to": 0.5, "epochs": 2}, "gamma": [[0, 1.0], [1, 0.5]]},
        "checkpoint": {"keep": 9},
    }
    path.write_text(yaml.safe_dump(sections))
    return path
