"""metrics.jsonl: one JSON object per line, appended and flushed, free of duplicates after a resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from esam_dist.metrics.rows import TrainRow, ValidationRow

FILE = "metrics.jsonl"


class JsonLines:
    """Appends rows to `folder/metrics.jsonl`; a row has left this process when `write` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / FILE).open("a", encoding="utf-8")

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Append one row, `kind` first; a value that is not finite becomes null, which every reader accepts."""
        row = {"kind": kind} | {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def rewind(folder: Path, step: int) -> int:
    """Drop the rows of `folder/metrics.jsonl` after `step`, and any that a kill cut off; return how many.

    Call it on rank 0 before `Metrics` is built, with the step that the run continues from (0: a new run, nothing is
    kept), so that a repeated step is not reported twice. The file is replaced in one move, so a kill here loses
    nothing.
    """
    path = folder / FILE
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step)]
    if len(kept) < len(lines):
        beside = path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    return len(lines) - len(kept)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl` in order, except a last line that is still being written."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [row for row in map(_parsed, lines) if row is not None]


def train_values(row: TrainRow) -> dict[str, Any]:
    """The fields of `row` as metrics.jsonl has them: phases as mean seconds."""
    values = dict(vars(row))
    values["phases"] = {phase: sum(seconds) / len(seconds) for phase, seconds in row.phases.items() if seconds}
    return values


def validation_values(row: ValidationRow) -> dict[str, Any]:
    """The fields of `row` as metrics.jsonl has them."""
    return dict(vars(row))


def _belongs(line: str, step: int) -> bool:
    row = _parsed(line)
    return row is not None and row["step"] <= step and step > 0


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = line.endswith("\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
