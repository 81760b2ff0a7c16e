"""Training with trackers, through the command line: one tracked run for one run, and not a bit of it changed."""

import hashlib
from pathlib import Path

import pytest

from tests.commands import here, rows
from tests.wandb_file import records

pytestmark = [pytest.mark.slow] + [
    pytest.mark.filterwarnings(f"ignore::{name}Warning") for name in ("Deprecation", "Future", "Resource")
]


def weights(folder: Path) -> dict[str, str]:
    """The checksums of the last checkpoint's files, but for what says when it was written."""
    newest = max((folder / "checkpoints").glob("step_*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.pt")}


def test_a_run_that_goes_on_is_one_run_of_each_tracker_and_its_weights_are_the_same(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri, folder = f"file:{tmp_path / 'mlruns'}", tmp_path / "tracked"
    tracked = ["metrics.wandb=offline", f"metrics.mlflow={uri}", "metrics.tensorboard=true"]
    for steps in (5, 12):
        answer = here("train", tiny, f"run.folder={folder}", f"train.max_steps={steps}", *tracked)
        assert answer.status == 0, answer.err
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("esam-dist").experiment_id])
    assert run.info.status == "FINISHED"
    told = [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "train/loss")]
    assert told == [(row["step"], row["loss"]) for row in rows(folder)]
    assert run.data.params["model.name"] == "cifar_resnet8"
    paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    assert len({path.name for path in paths}) == 1
    steps = [record for path in paths for record in records(path) if record.HasField("history")]
    assert len(steps) >= 12

    for steps in (5, 12):
        assert here("train", tiny, f"run.folder={tmp_path / 'alone'}", f"train.max_steps={steps}").status == 0
    assert weights(folder)
    assert weights(folder) == weights(tmp_path / "alone")
