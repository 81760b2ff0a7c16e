"""The folder of one run: its configuration, its environment, and the guard against mixing two runs.

config.yaml        the resolved configuration
environment.json   versions, device, ranks, git revision, command: of the latest start
history.json       how often it was started, and ended by a loss that is not finite
metrics.jsonl      one row per log interval and validation
checkpoints/       see `checkpoint`
run.lock           see `lock`; while a job trains there
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.files import remove_partial, write_file
from esam_dist.ranks import Ranks

logger = logging.getLogger(__name__)

# What may change when a run is continued: where it runs, how far, and how it is watched; not what it computes.
MAY_CHANGE = (
    *("run.folder", "run.resume", "data.path", "data.workers", "data.batch_size"),
    *("train.accumulate", "train.epochs", "train.max_steps", "train.log_every", "train.validate_every"),
    "train.check_replicas_every",
    *("engine.*", "checkpoint.*", "metrics.*"),
)


@dataclass(frozen=True)
class History:
    """What happened to a run in all its processes, also in those that came to no checkpoint."""

    starts: int = 0
    not_finite: int = 0
    """Ends because the training loss was not finite."""


@dataclass(frozen=True)
class Before:
    """What the process trained with that was here last."""

    cfg: config.Config
    world_size: int


def open_run_folder(cfg: config.Config, ranks: Ranks) -> Path:
    """The run's folder, made where this is rank 0, with one more start in its history; `describe` it then.

    Raises UserError when it holds a run of another configuration, or cannot be written.
    """
    folder = cfg.run.folder
    if not ranks.is_first:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        saved = folder / "config.yaml"
        begun = (folder / "checkpoints").exists() and (saved.exists() or any(folder.glob("checkpoints/step_*")))
        if begun:
            _refuse_another(cfg, folder)
        # Without a checkpoint, only an unchanged configuration says that it is the same run.
        same = begun or (saved.exists() and saved.read_bytes() == config.dump(cfg).encode())
        if not begun:
            _describe(cfg, ranks)
        history = read_history(folder) if same else History()
        _write_history(folder, replace(history, starts=history.starts + 1))
    except OSError as error:
        raise UserError(_unwritable(folder, error)) from error
    return folder


def describe(cfg: config.Config, ranks: Ranks) -> None:
    """Write down what trains from here on: not before it is known that something is left to do; for rank 0.

    Raises UserError where the folder cannot be written.
    """
    try:
        _describe(cfg, ranks)
    except OSError as error:
        raise UserError(_unwritable(cfg.run.folder, error)) from error


def read_before(folder: Path) -> Before | None:
    """What the run in `folder` was trained with so far; None where nothing says so."""
    try:
        held = json.loads((folder / "environment.json").read_bytes())
        return Before(config.load(folder / "config.yaml"), int(held["world_size"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_history(folder: Path) -> History:
    """The history of the run in `folder`; an empty one where there is none, or, with a warning, none can be read."""
    path = folder / "history.json"
    try:
        history = History(**json.loads(path.read_bytes()))
        counts = asdict(history)
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts.values()):
            raise ValueError(f"no counts: {counts}")
    except FileNotFoundError:
        return History()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("%s: cannot be read (%s); starts are counted anew", path, " ".join(str(error).split())[:120])
        return History()
    return history


def note_not_finite(folder: Path) -> None:
    """Add to the history of the run in `folder` an end because the training loss was not finite; for rank 0."""
    history = read_history(folder)
    with suppress(OSError):  # a full disk is not to hide why the run ends
        _write_history(folder, replace(history, not_finite=history.not_finite + 1))


def environment(ranks: Ranks) -> dict[str, Any]:
    """What this run runs on: enough to say later why two runs differ."""
    names = ("esam-dist", "torch", "torchvision", "deepspeed", "webdataset", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if ranks.device.type == "cuda" else None,
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
        "command": sys.argv,
    }


def _unwritable(folder: Path, error: OSError) -> str:
    return f"run.folder = {folder}: cannot be written ({error.strerror}); choose another"


def _describe(cfg: config.Config, ranks: Ranks) -> None:
    write_file(cfg.run.folder / "config.yaml", config.dump(cfg))
    write_file(cfg.run.folder / "environment.json", json.dumps(environment(ranks), indent=2) + "\n")


def _write_history(folder: Path, history: History) -> None:
    write_file(folder / "history.json", json.dumps(asdict(history)) + "\n")


def _refuse_another(cfg: config.Config, folder: Path) -> None:
    if cfg.run.resume == "never":
        raise UserError(
            f"run.resume = never, but run.folder = {folder} already holds checkpoints; "
            "choose another run.folder, or run.resume = auto to continue"
        )
    saved = folder / "config.yaml"
    if not saved.exists() or not saved.read_bytes().strip():
        raise UserError(
            f"run.folder = {folder}: config.yaml is {'empty' if saved.exists() else 'missing'}, so that nothing says "
            f"which run its checkpoints are of; write it again (`esam-dist config CONFIG > {saved}`, with the "
            "configuration of that run), or choose another run.folder"
        )
    before = config.flat(config.load(saved))
    for key, value in config.flat(cfg).items():
        may_change = key in MAY_CHANGE or f"{key.partition('.')[0]}.*" in MAY_CHANGE
        if value != before[key] and not may_change:
            raise UserError(
                f"run.folder = {folder} holds a run with {key} = {before[key]}, not {value}; choose another run.folder "
                f"(with run.resume={folder} it goes on from this run's weights), or the same configuration"
            )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the source tree that this package runs from; None for an installed package."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
