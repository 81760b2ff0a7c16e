"""Data and a small configuration for the runs of this folder."""

import subprocess
import sys

import pytest
import yaml
from servers import ROOT


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the digits as shards in data/ and a small configuration in config.yaml."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "esam_dist", "prepare", "digits", str(folder / "data")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=600)
    values = yaml.safe_load((ROOT / "configs/digits_esam.yaml").read_text())
    values["data"] |= {"path": str(folder / "data"), "batch_size": 16, "image_size": 16, "workers": 0}
    values["train"] |= {"epochs": 1000, "log_every": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder
