"""Weights & Biases and MLflow, for real and without a network: read back by what they bring along themselves."""

import json
import threading
import time
from pathlib import Path

import pytest

from esam_dist.config import parse
from esam_dist.errors import UserError
from esam_dist.metrics import Metrics, TrainRow, ValidationRow, trackers
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.metrics.trackers import DONE, Behind, Tracked
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from tests.commands import free_port
from tests.wandb_file import records

# Theirs, of Python versions to come.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}Warning") for name in ("Deprecation", "Future", "Resource")]

NUMBERS = dict.fromkeys([*("epoch", "lr", "grad_norm", "kept_fraction", "rho", "beta", "gamma"), "step_seconds"], 0.5)
NUMBERS |= {"images_per_second": 80.0, "data_wait_seconds": 0.0, "samples": 8, "kept_samples": 8}
BEGINNING = Progress(planned_steps=20)


def row(step: int, loss: float) -> TrainRow:
    nothing = {"sharpness": None, "selection_threshold": None}
    return TrainRow(step=step, loss=loss, **NUMBERS, **nothing, phases={"data": [0.1, 0.3]})


def build(folder: Path, standing: Progress = BEGINNING, **cfg: object) -> Metrics:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("optim: {lr: 0.1}\nmethod: {name: esam}\n")
    return Metrics(folder, MetricsKeys(**cfg), Ranks(), {"version": "0.1"}, standing)


def trained(folder: Path, standing: Progress = BEGINNING, *, steps: tuple[int, ...] = (10, 20), **cfg: object) -> None:
    """A process of a run that reports after these steps."""
    metrics = build(folder, standing, **cfg)
    for step in steps:
        metrics.train(row(step, 1.0 / step))
    metrics.validation(ValidationRow(steps[-1], 0.5, accuracy=0.9, top5_accuracy=1.0, loss=0.3, seconds=1.0))
    metrics.close()
    assert metrics.registry.get_sample_value("esam_tracker_failures_total") == 0


def history(path: Path) -> list[dict[str, float]]:
    """The rows of a .wandb file."""
    found = []
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def test_wandb_has_the_numbers_the_configuration_and_the_end(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    trained(folder, wandb="offline", project="mine")
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    first, second, validated = history(path)
    assert (first["step"], first["train/loss"], first["phases/data"]) == (10, 0.1, 0.2)
    assert (second["step"], second["train/loss"]) == (20, 0.05)
    assert (validated["step"], validated["validation/accuracy"]) == (20, 0.9)
    assert "train/sharpness" not in first
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name) == ("mine", "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optim"] == {"lr": 0.1}
    assert [record.exit.exit_code for record in records(path) if record.HasField("exit")] == [0]


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_and_another_does_not(tmp_path):
    pytest.importorskip("wandb")
    trained(tmp_path, steps=(10,), wandb="offline")
    trained(tmp_path, Progress(step=5, planned_steps=20), steps=(10, 20), wandb="offline")
    (known,) = json.loads((tmp_path / "trackers.json").read_text()).values()
    paths = sorted(tmp_path.glob(f"wandb/offline-run-*-{known}*/run-{known}.wandb"))
    assert [[entry["step"] for entry in history(path)] for path in paths] == [[10, 10], [10, 20, 20]]
    ends = [record.exit.exit_code for path in paths for record in records(path) if record.HasField("exit")]
    assert ends == [1, 0]  # the first was stopped
    trained(tmp_path, wandb="offline")
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] != known


@pytest.fixture
def client(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"file:{tmp_path / 'mlruns'}")


def test_mlflow_has_one_run_with_numbers_and_configuration_also_when_it_is_resumed(tmp_path, client):
    uri, folder = f"file:{tmp_path / 'mlruns'}", tmp_path / "run"
    trained(folder, steps=(10,), mlflow=uri, project="mine")
    experiment = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    trained(folder, Progress(step=5, planned_steps=20), mlflow=uri, project="mine")
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {"optim.lr": "0.1", "method.name": "esam"}
    assert run.data.tags["version"] == "0.1"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(entry.step, entry.value) for entry in losses] == [(10, 0.1), (10, 0.1), (20, 0.05)]
    assert run.data.metrics["validation/accuracy"] == 0.9
    trained(folder, mlflow=uri, project="mine")
    assert len(client.search_runs([experiment])) == 2


def test_a_run_that_is_lost_has_failed(tmp_path, client):
    metrics = build(tmp_path / "run", mlflow=f"file:{tmp_path / 'mlruns'}")
    metrics.train(row(20, 1.0))
    metrics.not_finite()
    metrics.close()
    (run,) = client.search_runs([client.get_experiment_by_name("esam-dist").experiment_id])
    assert run.info.status == "FAILED"


def test_a_server_that_does_not_answer_holds_nothing_up_and_is_said_once(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metrics = build(tmp_path, mlflow=f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    for step in range(100):
        metrics.train(row(step, 1.0))
    assert time.monotonic() - start < 1.0
    metrics.close()
    assert metrics.registry.get_sample_value("esam_tracker_failures_total") == 101
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("MLflow: takes no more rows (")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


class Given:
    """A tracker that does as the test says."""

    def __init__(self, fails: set[int] = frozenset(), waits: threading.Event | None = None) -> None:
        self.fails, self.waits, self.taken, self.status = fails, waits, [], None

    def open(self, run):
        if self.waits:
            self.waits.wait(30)

    def write(self, step, values):
        if step in self.fails:
            raise ConnectionError(f"step {step}\nis lost")
        self.taken.append((step, values))

    def close(self, status):
        self.status = status


def behind(tracker: Given, folder: Path, count: list[int]) -> Behind:
    return Behind("given", tracker, Tracked(folder, {}, goes_on=False), lambda: count.append(1))


def test_what_a_tracker_does_not_take_is_counted_and_said_once_each_time_it_begins(tmp_path, caplog):
    tracker, count = Given(fails={2, 3, 5}), []
    sink = behind(tracker, tmp_path, count)
    for step in range(1, 7):
        sink.write("train", {"step": step, "loss": 0.5, "name": "x", "bad": float("nan"), "phases": {"data": 1.0}})
    sink.close(DONE)
    assert tracker.taken == [(step, {"train/loss": 0.5, "phases/data": 1.0}) for step in (1, 4, 6)]
    assert (len(count), tracker.status) == (3, DONE)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"given: takes no more rows (ConnectionError: step {step} is lost); training goes on" for step in (2, 5)
    ]


def test_a_tracker_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    waits, count = threading.Event(), []
    sink = behind(Given(waits=waits), tmp_path, count)
    start = time.monotonic()
    for step in range(10):
        sink.write("train", {"step": step, "loss": 0.5})
    sink.close(DONE)
    assert time.monotonic() - start < 5
    assert len(count) >= 6
    assert "3 rows wait for it" in caplog.text
    assert "is left behind" in caplog.text
    waits.set()


@pytest.mark.parametrize(("key", "value"), [("wandb", "offline"), ("mlflow", "file:x")])
def test_a_missing_package_is_one_line_with_the_remedy(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"metrics.{key} = {value}.*pip install 'esam-dist\[{key}\]'"):
        build(tmp_path, **{key: value})


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "nothing_of_ours").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not installed"):
        trackers._need("nothing_of_ours", "key")


def test_the_service_needs_a_key(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(UserError, match=r"metrics.wandb = online: there is no API key; set WANDB_API_KEY"):
        build(tmp_path, wandb="online")


def test_a_password_in_the_uri_is_refused_and_not_repeated():
    with pytest.raises(UserError) as caught:
        parse({"metrics": {"mlflow": "http://me:hunter2@host:5000"}}, "given")
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_only_rank_0_tells_trackers(tmp_path):
    metrics = Metrics(tmp_path, MetricsKeys(wandb="offline"), Ranks(1, 1, 2), {}, None)
    metrics.close()
    assert not (tmp_path / "trackers.json").exists()
