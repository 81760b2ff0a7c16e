"""Trackers of experiments beside TensorBoard: Weights & Biases and MLflow, as options.

Each works in a thread of its own: one that is slow, or waits for a network, holds no training up, and one that fails
ends none. What it could not take is counted, and said once. Their ids are kept in the run folder, so that a run that
is resumed goes on in the tracked run that it had.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, NamedTuple, Protocol

import yaml

from esam_dist.errors import UserError
from esam_dist.files import write_file
from esam_dist.metrics.board import scalars
from esam_dist.metrics.keys import MetricsKeys

log = logging.getLogger("esam_dist")

FILE = "trackers.json"
MAX_WAITING = 10_000
CLOSE_SECONDS = 60.0
DONE, FAILED, STOPPED = "FINISHED", "FAILED", "KILLED"
"""How a run ended, in MLflow's words."""


class Tracked(NamedTuple):
    """The run as trackers show it."""

    folder: Path
    facts: dict[str, str]
    goes_on: bool
    """Whether it goes on in the tracked run that it has."""

    def config(self) -> dict[str, Any]:
        """The resolved configuration, as the run folder has it."""
        path = self.folder / "config.yaml"
        return dict(yaml.safe_load(path.read_bytes()) or {}) if path.exists() else {}

    def known(self, tracker: str) -> str | None:
        """The id under which `tracker` knows the run, if it goes on there."""
        return self._ids().get(tracker) if self.goes_on else None

    def remember(self, tracker: str, name: str) -> None:
        """Keep the id."""
        write_file(self.folder / FILE, json.dumps(self._ids() | {tracker: name}) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            ids = json.loads((self.folder / FILE).read_bytes())
        except (OSError, ValueError):
            return {}
        return {key: name for key, name in ids.items() if isinstance(name, str)} if isinstance(ids, dict) else {}


class Tracker(Protocol):
    """What takes numbers; each of its methods may raise anything."""

    def open(self, run: Tracked) -> None:
        """Begin, or go on."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of one row."""

    def close(self, status: str) -> None:
        """End in order."""


class Behind:
    """Hands the rows of a run to a tracker, behind the training."""

    def __init__(self, name: str, tracker: Tracker, run: Tracked, failed: Callable[[], None]) -> None:
        self._name, self._tracker, self._run, self._failed = name, tracker, run, failed
        self._is_open = self._is_said = False
        self._waiting: Queue[tuple[int, dict[str, float]] | str] = Queue(MAX_WAITING)
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Pass on the numbers of one row; never waits."""
        try:
            self._waiting.put_nowait((values["step"], scalars(kind, values)))
        except Full:
            self._fail(f"{MAX_WAITING} rows wait for it")

    def close(self, status: str) -> None:
        """End the tracked run, after what still waits, or give up after a minute."""
        try:
            self._waiting.put(status, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        except Full:
            pass
        if self._thread.is_alive():
            log.error("%s: does not end within %.0f s and is left behind", self._name, CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            row = self._waiting.get()
            try:
                if not self._is_open:
                    self._tracker.open(self._run)
                    self._is_open = True
                if isinstance(row, str):
                    self._tracker.close(row)
                else:
                    self._tracker.write(*row)
                    self._is_said = False
            except Exception as error:  # a library that others wrote, and their servers
                self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if isinstance(row, str):
                return

    def _fail(self, reason: str) -> None:
        self._failed()
        if not self._is_said:
            log.error("%s: takes no more rows (%s); training goes on", self._name, reason)
        self._is_said = True


class WeightsAndBiases:
    """A run of Weights & Biases: `offline` writes `RUN/wandb`, for `wandb sync`. Raises UserError."""

    def __init__(self, cfg: MetricsKeys) -> None:
        _need("wandb", f"metrics.wandb = {cfg.wandb}")
        self._cfg = cfg
        self._run: Any = None
        if cfg.wandb == "online":
            import wandb

            # It would ask for one, and nobody answers.
            if not wandb.api.api_key:
                raise UserError(
                    "metrics.wandb = online: there is no API key; set WANDB_API_KEY, or call `wandb login` once, or "
                    "write metrics.wandb = offline and `wandb sync` later"
                )

    def open(self, run: Tracked) -> None:
        """See `Tracker`."""
        import wandb

        name = run.known("wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            project=self._cfg.project,
            id=name,
            resume="allow",
            name=run.folder.name,
            dir=run.folder,
            mode="online" if self._cfg.wandb == "online" else "offline",
            config=run.config() | {"run_info": run.facts},
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own count of steps never goes back; a run that is killed does, to its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        run.remember("wandb", name)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step} | values)

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(status != DONE))


class MLflow:
    """A run of MLflow at `metrics.mlflow`, a tracking URI. Raises UserError where the package is missing."""

    def __init__(self, cfg: MetricsKeys) -> None:
        _need("mlflow", f"metrics.mlflow = {cfg.mlflow}")
        self._cfg = cfg
        self._client: Any = None
        self._id = ""

    def open(self, run: Tracked) -> None:
        """See `Tracker`."""
        # MLflow would rather have databases, and refuses folders without it.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._cfg.mlflow)
        known = run.known("mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self._cfg.project)
        experiment = found.experiment_id if found else self._client.create_experiment(self._cfg.project)
        self._id = self._client.create_run(experiment, run_name=run.folder.name, tags=run.facts).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(run.config())]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[start : start + 100])
        run.remember("mlflow", self._id)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status)


def open_trackers(cfg: MetricsKeys, run: Tracked, failed: Callable[[], None]) -> list[Behind]:
    """The trackers that the configuration asks for. Raises UserError where a package is missing."""
    wanted: list[tuple[str, Callable[[MetricsKeys], Tracker], bool]] = [
        ("Weights & Biases", WeightsAndBiases, cfg.wandb != "off"),
        ("MLflow", MLflow, bool(cfg.mlflow)),
    ]
    trackers = [(name, make(cfg)) for name, make, is_wanted in wanted if is_wanted]
    return [Behind(name, tracker, run, failed) for name, tracker in trackers]


def _need(package: str, key: str) -> None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # `wandb/` in the working directory is no package
        raise UserError(f"{key}: the package is not installed; pip install 'esam-dist[{package}]'")


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]
    return flat
