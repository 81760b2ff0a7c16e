"""What every target is."""

from __future__ import annotations

import resource
import time
from typing import Protocol

SECONDS = 5.0
"""So long the processor may be busy with one input."""


class Target(Protocol):
    """Something that reads what it is given."""

    allowed: tuple[type[Exception], ...]
    """The documented errors: nothing else may come out."""
    modules: tuple[str, ...]
    """Whose lines are counted as covered."""
    memory_bytes: int
    """By so much one input may raise the highest memory of the process."""

    def seeds(self) -> list[bytes]:
        """Inputs that are sound, and a few that are known to be bad."""

    def run(self, data: bytes) -> None:
        """Read `data`."""


def attempt(target: Target, data: bytes) -> bool:
    """Whether `target` takes `data`; False where it refuses it by a documented error.

    Raises whatever else it raises; TimeoutError or MemoryError beyond its limits; AssertionError for a line that is
    none.
    """
    # Of this process: other programs may take their time.
    start, before = time.process_time(), _peak_bytes()
    taken = True
    try:
        target.run(data)
    except target.allowed as error:
        taken = False
        _check_line(error)
    seconds, more = time.process_time() - start, _peak_bytes() - before
    if seconds > SECONDS:
        raise TimeoutError(f"{seconds:.1f} s")
    if more > target.memory_bytes:
        raise MemoryError(f"{more / 2**20:.0f} MiB more")
    return taken


def _check_line(error: Exception) -> None:
    if isinstance(error, ValueError):
        text = str(error)
        assert text.isprintable(), f"not one line that can be printed: {text!r}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
