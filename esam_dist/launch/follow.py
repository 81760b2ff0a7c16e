"""Shows the per-rank logs that the deepspeed runner writes, each line with its rank before it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import TextIO

NAME = re.compile(r"_rank(\d+)\.log$")


def sizes(folder: Path) -> dict[Path, int]:
    """How much of each log is there already, in bytes."""
    return {path: path.stat().st_size for path in _logs(folder)}


def follow(
    folder: Path, before: dict[Path, int], over: threading.Event, out: TextIO, every_seconds: float = 0.2
) -> None:
    """Copy to `out` what the logs in `folder` gain over `before`, until `over` is set and all is shown."""
    seen = dict(before)
    last = False
    while not last:
        last = over.is_set()
        for path in _logs(folder):
            seen[path] = _show(path, seen.get(path, 0), out, last)
        if not last:
            time.sleep(every_seconds)


def _logs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.log") if NAME.search(path.name))


def _show(path: Path, start: int, out: TextIO, last: bool) -> int:
    match = NAME.search(path.name)
    assert match
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    if not last:
        data = data[: data.rfind(b"\n") + 1]  # a line that is still being written waits
    for line in data.decode(errors="replace").splitlines():
        out.write(f"[rank {match[1]}] {line}\n")
    out.flush()
    return start + len(data)
