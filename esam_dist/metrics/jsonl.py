"""metrics.jsonl: one JSON object per line, appended and flushed, free of duplicates after a resume."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from esam_dist.errors import UserError
from esam_dist.files import write_file
from esam_dist.metrics.rows import TrainRow, ValidationRow

log = logging.getLogger("esam_dist")

FILE = "metrics.jsonl"
MAX_WAITING = 10_000
WITH_EPOCH = ("train", "validation")


class JsonLines:
    """Appends rows to `folder/metrics.jsonl`; a row has left this process when `write` returns.

    Rows that the disk refuses wait for the next one, the newest 10,000 of them: a full disk ends no training.
    Raises UserError where the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._refused = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise _unusable(self._path, error) from error

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Append one row, `kind` first; a value that is not finite becomes null, which every reader accepts."""
        row = {"kind": kind} | {key: _plain(value) for key, value in values.items()}
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        try:
            self._append()
            self._refused = False
        except OSError as error:
            if not self._refused:
                log.error("%s: a row cannot be written (%s); rows wait for room", self._path, error.strerror)
            self._refused = True

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._append()
        if self._waiting:
            log.error("%s: %d rows are lost, as they could not be written", self._path, len(self._waiting))
        with suppress(OSError):
            self._file.close()

    def _append(self) -> None:
        while self._waiting:
            left, end = memoryview(self._waiting[0]), self._file.seek(0, 2)
            try:
                while left:  # a disk that is nearly full takes a part
                    left = left[self._file.write(left) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(end)
                raise
            self._waiting.popleft()


def rewind(folder: Path, step: int) -> int:
    """Drop the rows of `folder/metrics.jsonl` after `step`, and any that a kill cut off; return how many.

    Call it on rank 0 before `Metrics` is built, with the step that the run continues from (0: a new run, nothing is
    kept), so that a repeated step is not reported twice. The file is replaced in one move, so a kill here loses
    nothing. Raises UserError where it cannot be read or written.
    """
    lines = _lines(folder / FILE)
    kept = [line for line in lines if _belongs(line, step)]
    if len(kept) < len(lines):
        try:
            write_file(folder / FILE, b"".join(kept))
        except OSError as error:
            raise _unusable(folder / FILE, error) from error
    return len(lines) - len(kept)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl` in order, without a last line that is still being written.

    Lines that are no rows are left out, with one warning. Raises UserError where the file cannot be read.
    """
    lines = _lines(folder / FILE)
    rows = [row for row in map(_parsed, lines) if row is not None]
    broken = len(lines) - len(rows) - int(bool(lines) and not lines[-1].endswith(b"\n"))
    if broken:
        log.warning("%s: %d of %d lines are no rows, and left out", folder / FILE, broken, len(lines))
    return rows


def train_values(row: TrainRow) -> dict[str, Any]:
    """The fields of `row` as metrics.jsonl has them: phases as mean seconds."""
    values = dict(vars(row))
    values["phases"] = {phase: sum(seconds) / len(seconds) for phase, seconds in row.phases.items() if seconds}
    return values


def validation_values(row: ValidationRow) -> dict[str, Any]:
    """The fields of `row` as metrics.jsonl has them."""
    return dict(vars(row))


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read and written ({error.strerror}); mend it, or choose another run.folder")


def _belongs(line: bytes, step: int) -> bool:
    row = _parsed(line)
    return row is not None and row["step"] <= step and step > 0


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    return row if row["kind"] not in WITH_EPOCH or _is_number(row.get("epoch")) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
