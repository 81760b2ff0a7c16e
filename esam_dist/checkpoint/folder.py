"""The folder of a run's checkpoints: each is written beside, read back and renamed; the newest and the best are kept.

`step_NNNNNNNN/state.pt` holds tensors and plain values only (read with `weights_only=True`), `metadata.json` the step,
the validation accuracy where it was measured, and the SHA-256 of `state.pt`. A folder with this name is complete:
it gets the name last. It is sound when its checksum fits, nothing is missing, and all is finite (`soundness`).
Only rank 0 touches the disk, so no file system needs to be shared.

`.partial_step_N`     being written, or left by a kill
`.replaced_step_N`    what a new `step_N` has replaced; counts as `step_N` where a kill came in between
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from esam_dist import soundness
from esam_dist.checkpoint import sealed
from esam_dist.errors import CheckpointNotWrittenError, StateNotFiniteError, UserError
from esam_dist.files import flush_folder
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

    def save(self, state: State, step: int, accuracy: float | None = None, given_up: Callable[[], bool] = bool) -> Path:
        """Write `state` as the checkpoint of `step`, and drop those that are no longer to be kept.

        Raises StateNotFiniteError, or CheckpointNotWrittenError where the disk refuses, or, before it has its name,
        as soon as `given_up()`; all others are still there.
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
            self._make(partial)
            sealed.write(partial, state, {"step": step, "accuracy": accuracy}, given_up)
            self._put_in_place(partial, final)
        except OSError as error:
            with suppress(OSError):
                _remove(partial)
            raise CheckpointNotWrittenError(
                f"checkpoint of step {step}: cannot be written to {self.folder} ({error.strerror or error}); "
                f"make room or mend the disk; the newest there is {self._newest_name()}"
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
                return path, sealed.read(path)
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
            if path.name not in self._broken and (accuracy := sealed.accuracy(path)) is not None
        ]
        return max(measured)[2] if measured else None

    def way_back(self) -> str:
        """What to add to the command of a run that diverged, so that it goes on otherwise than it did."""
        newest = self._newest_name()
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

    def _newest_name(self) -> str:
        with suppress(UserError):
            found = [path for path in self.all() if path.name not in self._broken]
            return str(found[-1]) if found else "none"
        return "none"

    def _make(self, partial: Path) -> None:
        # Without its parents: a run folder that is gone, with all that it held, must not seem to be there.
        self.folder.mkdir(exist_ok=True)
        self._clear()
        partial.mkdir()

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


def _number(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
