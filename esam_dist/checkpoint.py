"""Checkpoints: a folder written beside, read back and renamed, with a checksum; the newest and the best are kept.

`step_NNNNNNNN/state.pt` holds tensors and plain values only (read with `weights_only=True`), `metadata.json` the step,
the validation accuracy where it was measured, and the SHA-256 of `state.pt`. A folder with this name is complete:
it gets the name last. It is sound when its checksum fits, nothing is missing, and all is finite (`soundness`).
Only rank 0 touches the disk, so no file system needs to be shared.

`.partial_step_N`     being written, or left by a kill
`.replaced_step_N`    what a new `step_N` has replaced; counts as `step_N` where a kill came in between
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from esam_dist import soundness
from esam_dist.checksum import sha256
from esam_dist.errors import CheckpointNotWrittenError, StateNotFiniteError, UserError
from esam_dist.files import flush_file, flush_folder, write_file
from esam_dist.soundness import State

logger = logging.getLogger(__name__)

STEP = re.compile(r"(?:\.replaced_)?step_([0-9]{8,})")
OURS = re.compile(r"\.(?:partial|replaced)_step_[0-9]{8,}")


class Checkpoints:
    """The checkpoints in `folder`, of which the `keep` newest and the best by accuracy stay.

    `check_owner` is called before anything is written, and raises UserError where another job has taken over.
    """

    def __init__(self, folder: Path, keep: int, check_owner: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._keep = keep
        self._check_owner = check_owner
        self._broken: set[str] = set()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first; whether one is sound, `read` finds out."""
        return [path for path in self._found() if (path / "metadata.json").is_file()]

    def save(self, state: State, step: int, accuracy: float | None = None) -> Path:
        """Write `state` as the checkpoint of `step`, and drop those that are no longer to be kept.

        Raises StateNotFiniteError, or CheckpointNotWrittenError where the disk refuses; all others are still there.
        """
        self._check_owner()
        name = soundness.unsound(state)
        if name is not None:
            raise StateNotFiniteError(
                f"{name} is not finite at step {step}, so that no checkpoint is written: {self.way_back()}"
            )
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".partial_{final.name}"
        try:
            self._write(state, partial, {"step": step, "accuracy": accuracy})
            self._put_in_place(partial, final)
        except OSError as error:
            with suppress(OSError):
                _remove(partial)
            raise CheckpointNotWrittenError(
                f"checkpoint of step {step}: cannot be written to {self.folder} ({error.strerror or error}); "
                f"make room or mend the disk; the newest there is {self.newest_name()}"
            ) from error
        self._broken.discard(final.name)
        try:
            self._prune(step)
        except (OSError, UserError) as error:
            logger.warning("%s: an old checkpoint cannot be removed (%s)", self.folder, error)
        return final

    def newest(self) -> tuple[Path, State] | None:
        """The newest sound checkpoint and its state; each that is broken is passed over with a warning that says why.

        None when there is no checkpoint at all. Raises UserError when there are some and none is sound: to start
        again from nothing would be the user's decision.
        """
        found = self._found()
        self._name_strays()
        for path in reversed(found):
            try:
                return path, read(path)
            except UserError as error:
                self._broken.add(path.name)
                logger.warning("passed over: %s", error)
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.folder} is sound; run.resume = auto begins anew only "
                "where there are none: remove them, or choose another run.folder"
            )
        return None

    def best(self) -> Path | None:
        """The checkpoint with the highest validation accuracy (of equals, the newest)."""
        measured = [
            (accuracy, _number(path), path)
            for path in self.all()
            if path.name not in self._broken and (accuracy := _accuracy(path)) is not None
        ]
        return max(measured)[2] if measured else None

    def way_back(self) -> str:
        """What to add to the command of a run that diverged, so that it goes on otherwise than it did."""
        newest = self.newest_name()
        if newest == "none":
            return "there is no checkpoint to go back to; start again with a lower optim.lr"
        return f"to go on from the newest checkpoint, add run.folder=NEW run.resume={newest} optim.lr=LOWER"

    def _found(self) -> list[Path]:
        try:
            return self._steps()
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be read as a folder of checkpoints ({error.strerror}); move it or mend it"
            ) from error

    def _steps(self) -> list[Path]:
        """The folders with the name of a checkpoint, oldest first, one for a step."""
        found: dict[int, Path] = {}
        for path in sorted(self._entries()):  # .replaced_ sorts before step_
            if STEP.fullmatch(path.name) and path.is_dir():
                found[_number(path)] = path
        return [found[number] for number in sorted(found)]

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _name_strays(self) -> None:
        steps = set(self._steps())
        strays = [path.name for path in self._entries() if path not in steps and not OURS.fullmatch(path.name)]
        if strays:
            more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
            logger.warning("%s: no checkpoints, passed over: %s%s", self.folder, ", ".join(sorted(strays)[:5]), more)

    def newest_name(self) -> str:
        """The newest that is not known as broken, without a look into it; `none` where there is none."""
        with suppress(UserError):
            found = [path for path in self.all() if path.name not in self._broken]
            return str(found[-1]) if found else "none"
        return "none"

    def _write(self, state: State, partial: Path, metadata: dict[str, Any]) -> None:
        # Without its parents: a run folder that is gone, with all that it held, must not seem to be there.
        self.folder.mkdir(exist_ok=True)
        self._clear()
        partial.mkdir()
        written = _write_state(partial / "state.pt", state)
        if sha256(partial / "state.pt") != written:
            raise OSError(errno.EIO, "it reads otherwise than it was written")
        write_file(partial / "metadata.json", json.dumps(metadata | {"sha256": written}))

    def _put_in_place(self, partial: Path, final: Path) -> None:
        replaced = self.folder / f".replaced_{final.name}"
        if os.path.lexists(final):
            # Moved first: at every moment one of the two can be found.
            final.rename(replaced)
        partial.rename(final)
        flush_folder(self.folder)
        _remove(replaced)

    def _clear(self) -> None:
        """Remove what killed processes left, except what counts as a checkpoint."""
        steps = set(self._steps())
        for path in self._entries():
            if OURS.fullmatch(path.name) and path not in steps:
                _remove(path)

    def _prune(self, step: int) -> None:
        # Broken ones, and those of a later step (passed over at the start), do not count among the newest.
        found = [path for path in self.all() if _number(path) <= step]
        kept = [path for path in found if path.name not in self._broken][-self._keep :]
        best = self.best()
        for path in found:
            if _number(path) < _number(kept[0]) and path != best:
                # Renamed first: a folder named step_* is always complete, even if this process dies here.
                doomed = self.folder / f".partial_step_{_number(path):08d}"
                path.rename(doomed)
                _remove(doomed)


def read(path: Path) -> State:
    """The state in the checkpoint folder `path`. Raises UserError when it is missing, broken or unreadable."""
    try:
        if sha256(path / "state.pt") != _metadata(path)["sha256"]:
            raise UserError(f"checkpoint {path}: state.pt does not match its checksum; use another checkpoint")
        state: State = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever JSON, pickle and torch make of a file that is no checkpoint
        raise UserError(f"checkpoint {path}: cannot be read ({_reason(error)}); use another checkpoint") from error
    fault = soundness.fault(state)
    if fault:
        raise UserError(f"checkpoint {path}: {fault}; use another checkpoint")
    return state


class _Hashed:
    """A file that knows the checksum of what was written to it, and keeps an error to itself.

    Through torch's C++ a full disk would come out as a RuntimeError without its number.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Left to whoever owns the file."""


def _write_state(path: Path, state: State) -> str:
    """Write `state` to `path` and to the disk; the checksum of what was to be written."""
    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(state, hashed)  # type: ignore[arg-type]  # it asks for IO[bytes], and takes what writes
        if hashed.error is not None:
            raise hashed.error
        flush_file(file)
        # What is read back is to come from the disk, not from memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashed.digest.hexdigest()


def _metadata(path: Path) -> dict[str, Any]:
    metadata = json.loads((path / "metadata.json").read_bytes())
    if not isinstance(metadata, dict) or not isinstance(metadata.get("sha256"), str):
        raise ValueError("metadata.json: names no sha256")
    return metadata


def _accuracy(path: Path) -> float | None:
    try:
        accuracy = float(_metadata(path)["accuracy"])
    except Exception:  # not measured, or broken: not the best one; it must not stop the next from being saved
        return None
    return accuracy if math.isfinite(accuracy) else None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return " ".join(str(error).split())[:120] or type(error).__name__


def _number(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
