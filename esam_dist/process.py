"""Which process this is beyond its number, which another one may get after it."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def began(pid: int) -> str | None:
    """When the process `pid` of this machine began, in the kernel's own count; None: it is gone.

    Empty where it lives, but its beginning cannot be told: another user's process, or a system without /proc.
    """
    try:
        # The name, in brackets, may itself hold brackets and spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""


def place() -> str:
    """The boot of this machine, and the process namespace (a container's) in it; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
