"""Runs as read from their folders, and groups of runs that differ only in their seed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esam_dist import config, findings
from esam_dist.checkpoint import Checkpoints
from esam_dist.config import strict_yaml
from esam_dist.errors import UserError
from esam_dist.findings import Findings
from esam_dist.metrics import jsonl

log = logging.getLogger(__name__)

Row = dict[str, Any]
NOT_THE_METHOD = ("run.", "metrics.", "checkpoint.")  # keys that say where a run writes, not what it learns


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    settings: dict[str, str]
    """`section.key` to value, as in config.yaml."""
    environment: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    evaluations: list[Findings] = field(default_factory=list)
    """What `esam-dist evaluate` wrote there: of its own data, then of others."""

    @property
    def seed(self) -> str:
        """The seed, as text."""
        return self.settings.get("run.seed", "?")

    @property
    def restarts(self) -> list[float]:
        """The epochs at which the run was continued from a checkpoint."""
        found, before = [], 0
        for row in self.train:
            if row.get("restarts", 0) > before:
                found.append(float(row["epoch"]))
                before = row["restarts"]
        return found

    @property
    def seconds(self) -> float:
        """Time of the training steps, without validation and checkpoints, which depend more on the machine."""
        return self.seconds_at(max((row["step"] for row in self.train), default=0))

    def seconds_at(self, step: int) -> float:
        """The same until `step`."""
        steps = [0, *(row["step"] for row in self.train)]
        each = [row.get("step_seconds") or 0.0 for row in self.train]
        return float(np.interp(step, steps, np.cumsum([0.0, *np.diff(steps) * each])))

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """(step, accuracy) of every validation."""
        found = [(row["step"], row.get("accuracy")) for row in self.validation]
        return [(step, accuracy) for step, accuracy in found if isinstance(accuracy, int | float)]

    @property
    def checkpoints(self) -> tuple[Path | None, Path | None]:
        """The best and the newest."""
        there = Checkpoints(self.folder / "checkpoints", keep=1)
        try:
            found = there.all()
        except UserError as error:
            log.warning("%s", error)
            found = []
        return (there.best(), found[-1]) if found else (None, None)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, under a name that distinguishes them from the other groups."""

    name: str
    runs: list[Run]


@dataclass(frozen=True)
class Curve:
    """Mean over the seeds of one group, and the half width of its 95% interval (nan for fewer than three seeds)."""

    x: list[float]
    y: list[float]
    half: list[float]


def read(folder: Path) -> Run:
    """The run in `folder`. Raises UserError where there is none, or nothing was reported yet."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give the folder of a run (run.folder)")
    rows = jsonl.read(folder)
    if not rows:
        raise UserError(
            f"{folder}: holds no rows in metrics.jsonl; give the folder of a run (run.folder) that has begun"
        )
    return Run(
        folder,
        _settings(folder / "config.yaml"),
        _environment(folder / "environment.json"),
        [row for row in rows if row["kind"] == "train"],
        [row for row in rows if row["kind"] == "validation"],
        _evaluations(folder),
    )


def read_all(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in `folders`, and of each folder without one why it is passed over. Raises UserError without any run."""
    found, passed_over = [], []
    for folder in folders:
        try:
            found.append(read(folder))
        except UserError as error:
            passed_over.append(str(error))
    if not found:
        raise UserError(passed_over[0])
    return found, passed_over


def group(runs: list[Run]) -> list[Group]:
    """Put runs of the same method together, in the order in which they were given."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(_method(run).items())), []).append(run)
    methods = [_method(run) for run in runs]
    # A key that only one method has tells nothing that its name does not.
    differing = {key for key in _keys(runs) if len({method[key] for method in methods if key in method}) > 1}
    return [Group(_name(members, differing), members) for members in found.values()]


def curve(members: Group, rows: str, key: str, *, by_time: bool = False) -> Curve:
    """`key` over the epochs, or seconds, at which every seed of the group has a value.

    `rows` is `train` or `validation`. Over time, a point is at the mean of the seeds' times.
    """
    tables = []
    for run in members.runs:
        values = [row for row in getattr(run, rows) if isinstance(row.get(key), int | float)]
        at = {row["step"]: run.seconds_at(row["step"]) if by_time else row["epoch"] for row in values}
        tables.append({row["step"]: (at[row["step"]], row[key]) for row in values})
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    points = np.array([[table[step] for step in steps] for table in tables], dtype=float).reshape(len(tables), -1, 2)
    half = [interval([float(v) for v in points[:, i, 1]])[1] for i in range(len(steps))]
    return Curve(points[:, :, 0].mean(axis=0).tolist(), points[:, :, 1].mean(axis=0).tolist(), half)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half width of its 95% confidence interval by Student's t.

    The half width is nan for fewer than three values. For two it would be nine times their distance: no use.
    """
    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 3:
        return mean, math.nan
    from scipy.stats import t

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def phases(members: Group) -> dict[str, float]:
    """Mean seconds per step of each phase, over all rows and seeds."""
    collected: dict[str, list[float]] = {}
    for run in members.runs:
        for row in run.train:
            for phase, seconds in row.get("phases", {}).items():
                if seconds is not None:
                    collected.setdefault(phase, []).append(seconds)
    return {phase: sum(seconds) / len(seconds) for phase, seconds in collected.items()}


def _settings(path: Path) -> dict[str, str]:
    sections = (strict_yaml.read(path, str(path)) or {}) if path.exists() else {}
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise UserError(f"{path}: is no configuration of sections; give the folder of a run, as training left it")
    return {
        f"{name}.{key}": "" if value is None else str(value)
        for name, section in sections.items()
        for key, value in section.items()
    }


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        log.warning("%s: cannot be read, and is left out", path)
    return values if isinstance(values, dict) else {}


def _evaluations(folder: Path) -> list[Findings]:
    stem, _, suffix = findings.FILE.partition(".")
    found = []
    for path in [folder / findings.FILE, *sorted(folder.glob(f"{stem}_*.{suffix}"))]:
        if path.exists():
            try:
                found.append(findings.read(path))
            except UserError as error:
                log.warning("%s", error)
    return found


def _method(run: Run) -> dict[str, str]:
    # A run of an older version lacks the newer keys; it behaved as their defaults do.
    method = run.settings.get("method.name")
    defaults = {
        key.name: key.default
        for key in config.keys()  # noqa: SIM118
        if not key.methods or method in key.methods
    }
    return {key: value for key, value in (defaults | run.settings).items() if not key.startswith(NOT_THE_METHOD)}


def _keys(runs: list[Run]) -> list[str]:
    return sorted({key for run in runs for key in _method(run)})


def _name(members: list[Run], differing: set[str]) -> str:
    if not differing:
        return members[0].folder.name
    chosen = _method(members[0])
    words = [chosen.get("method.name", "?")] if "method.name" in differing else []
    own = sorted(key for key in differing - {"method.name"} if key in chosen)
    words += [f"{key.partition('.')[2]} {chosen[key]}" for key in own]
    return ", ".join(words)
