"""What the tests share: prepared digits, and a run as small as can be."""

import os
from pathlib import Path

# Before torch is imported: two ranks on two cores are slower with more threads, and sums depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import yaml

from esam_dist.data.prepare import prepare_digits

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards; read only."""
    root = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(root)
    return root


@pytest.fixture(scope="session")
def tiny(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that takes a second; `run.folder` is for the test to choose."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    sections = {
        "data": {"path": str(digits), "batch_size": 8, "workers": 0, "image_size": 16},
        "train": {"epochs": 1, "max_steps": 3, "log_every": 1},
        "optim": {"lr": 0.05},
    }
    path.write_text(yaml.safe_dump(sections))
    return path
