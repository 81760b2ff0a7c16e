"""The processes of a job, as /proc tells of them: which is which, and what each holds. Linux only."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MARK = "ESAM_BENCHMARK_JOB"
"""The variable of the environment by which a job's processes are found, orphans too: it has the job's own value."""


class Process(NamedTuple):
    """One process of a job."""

    pid: int
    role: str
    """`agent`, `rank`, `worker` (a loader process) or `other`."""
    rank: int | None
    """Its rank, or that of the rank it belongs to."""


class Usage(NamedTuple):
    """What a process holds. Anonymous pages are its own, whoever else maps the same libraries."""

    rss_bytes: int
    pss_bytes: int
    anonymous_bytes: int
    shared_memory_bytes: int
    """Its share of /dev/shm and the like."""
    descriptors: int
    threads: int


def of_job(mark: str) -> list[Process]:
    """The living processes whose environment has `mark`; zombies, which hold nothing, are left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError):
            environ = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if wanted in environ:
                found.append(_described(int(entry), environ))
    return sorted(found)


def usage(pid: int) -> Usage:
    """What the process `pid` holds now. Raises OSError where it is gone."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    status = _fields(Path(f"/proc/{pid}/status").read_text())
    rss, pss, own, shared = (1024 * rollup.get(name, 0) for name in ("Rss", "Pss", "Anonymous", "Pss_Shmem"))
    return Usage(rss, pss, own, shared, len(os.listdir(f"/proc/{pid}/fd")), status["Threads"])


def _described(pid: int, environ: list[bytes]) -> Process:
    rank = next((int(line[5:]) for line in environ if line.startswith(b"RANK=")), None)
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if b"launch" in words:
        return Process(pid, "agent", None)
    if rank is None or b"train" not in words:
        return Process(pid, "other", rank)
    # torchrun gives every rank a session of its own; what the rank forks stays in it.
    return Process(pid, "rank" if os.getsid(pid) == pid else "worker", rank)


def _fields(text: str) -> dict[str, int]:
    """The whole numbers of lines such as `Rss:   12 kB`."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(value.split()[0]) for name, value in pairs if value.split() and value.split()[0].isdigit()}
