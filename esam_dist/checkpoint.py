"""Checkpoints: a folder written beside and renamed, with a checksum; the newest and the best are kept.

`step_NNNNNNNN/state.pt` holds tensors and plain values only (read with `weights_only=True`), `metadata.json` the step,
the validation accuracy where it was measured, and the SHA-256 of `state.pt`. A folder with this name is complete:
it gets the name last. Only rank 0 touches the disk, so no file system needs to be shared.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from esam_dist.checksum import sha256
from esam_dist.errors import UserError

logger = logging.getLogger(__name__)

State = dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder`, of which the `keep` newest and the best by accuracy stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / "metadata.json").is_file())

    def save(self, state: State, step: int, accuracy: float | None = None) -> Path:
        """Write `state` as the checkpoint of `step`, and drop those that are no longer to be kept."""
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".partial_{final.name}"
        for leftover in self.folder.glob(".partial_*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        with (partial / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        metadata = {"step": step, "accuracy": accuracy, "sha256": sha256(partial / "state.pt")}
        with (partial / "metadata.json").open("w") as file:
            json.dump(metadata, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush_folder(self.folder)
        self._prune()
        return final

    def newest(self) -> tuple[Path, State] | None:
        """The newest valid checkpoint and its state; a damaged one is passed over with a warning.

        None when there is no checkpoint at all. Raises UserError when there are some and none is valid: to start
        again from nothing would be the user's decision.
        """
        found = self.all()
        for path in reversed(found):
            try:
                return path, read(path)
            except UserError as error:
                logger.warning("passed over: %s", error)
        if found:
            raise UserError(
                f"run.resume = auto: none of the {len(found)} checkpoints in {self.folder} is valid; "
                "remove them to start again, or set run.resume to a valid one"
            )
        return None

    def best(self) -> Path | None:
        """The checkpoint with the highest validation accuracy (of equals, the newest)."""
        measured = [(accuracy, path) for path in self.all() if (accuracy := _accuracy(path)) is not None]
        return max(measured)[1] if measured else None

    def _prune(self) -> None:
        found = self.all()
        for path in found[: -self._keep]:
            if path != self.best():
                # Renamed first: a folder named step_* is always complete, even if this process dies here.
                doomed = path.with_name(f".partial_{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)


def read(path: Path) -> State:
    """The state in the checkpoint folder `path`. Raises UserError when it is missing, damaged or unreadable."""
    try:
        metadata = json.loads((path / "metadata.json").read_text())
        if sha256(path / "state.pt") != metadata["sha256"]:
            raise UserError(f"checkpoint {path}: state.pt does not match its checksum; use another checkpoint")
        state: State = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"checkpoint {path}: cannot be read ({reason}); use another checkpoint") from error
    return state


def _accuracy(path: Path) -> float | None:
    try:
        accuracy = json.loads((path / "metadata.json").read_text())["accuracy"]
        return None if accuracy is None else float(accuracy)
    except (OSError, ValueError, KeyError, TypeError):
        # A damaged checkpoint is not the best one; it must not stop the next from being saved.
        return None


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
