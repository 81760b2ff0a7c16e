"""What is in the folder of one checkpoint: `state.pt`, and `metadata.json` with its checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from esam_dist import soundness
from esam_dist.checksum import sha256
from esam_dist.errors import UserError
from esam_dist.files import flush_file, write_file
from esam_dist.soundness import State

BLOCK_BYTES = 1 << 24
"""Written at once: so long it takes until a write is given up."""


def read(path: Path) -> State:
    """The state in the checkpoint folder `path`. Raises UserError when it is missing, broken or unreadable."""
    try:
        if sha256(path / "state.pt") != metadata(path)["sha256"]:
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


def write(path: Path, state: State, facts: dict[str, Any], given_up: Callable[[], bool]) -> None:
    """Fill the empty folder `path`, and read back what is on the disk. `facts`: what `metadata.json` says besides.

    Raises OSError where the disk refuses, where it reads otherwise than it was written, and as soon as `given_up()`.
    """
    written = _write_state(path / "state.pt", state, given_up)
    if sha256(path / "state.pt", lambda: _go_on(given_up)) != written:
        raise OSError(errno.EIO, "it reads otherwise than it was written")
    write_file(path / "metadata.json", json.dumps(facts | {"sha256": written}))
    _go_on(given_up)


def metadata(path: Path) -> dict[str, Any]:
    """What `metadata.json` says. Raises ValueError or OSError."""
    found = json.loads((path / "metadata.json").read_bytes())
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), str):
        raise ValueError("metadata.json: names no sha256")
    return found


def accuracy(path: Path) -> float | None:
    """The validation accuracy that was saved with it."""
    try:
        value = float(metadata(path)["accuracy"])
    except Exception:  # not measured, or broken: not the best one; it must not stop the next from being saved
        return None
    return value if math.isfinite(value) else None


class Hashed:
    """A file that knows the checksum of what was written to it, and keeps an error to itself.

    Through torch's C++ a full disk would come out as a RuntimeError without its number.
    """

    def __init__(self, file: BinaryIO, given_up: Callable[[], bool]) -> None:
        self._file, self._given_up = file, given_up
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write `data`, unless something went wrong before."""
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), BLOCK_BYTES):
            if self.error is None:
                self._write(whole[start : start + BLOCK_BYTES])
        return len(whole)

    def _write(self, block: memoryview) -> None:
        try:
            _go_on(self._given_up)
            self._file.write(block)
            self.digest.update(block)
        except OSError as error:
            self.error = error

    def flush(self) -> None:
        """Left to whoever owns the file."""


def _write_state(path: Path, state: State, given_up: Callable[[], bool]) -> str:
    """Write `state` to `path` and to the disk; the checksum of what was to be written."""
    with path.open("wb") as file:
        hashed = Hashed(file, given_up)
        torch.save(state, hashed)  # type: ignore[arg-type]  # it asks for IO[bytes], and takes what writes
        if hashed.error is not None:
            raise hashed.error
        flush_file(file)
        # What is read back is to come from the disk, not from memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashed.digest.hexdigest()


def _go_on(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise OSError(errno.ECANCELED, "given up, as the process ends")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return " ".join(str(error).split())[:120] or type(error).__name__
