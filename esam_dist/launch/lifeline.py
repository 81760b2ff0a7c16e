"""A rank ends with its launcher, and hears a signal while it waits to meet the other ranks.

torchrun and DeepSpeed end their ranks when they are stopped, not when they are killed: the ranks would train on, and
write into the run folder of whoever starts the job again.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

EVERY_SECONDS = 1.0
# So long a rank waits for the others at a signal, to stop together, in order. Longer may be in vain.
MEETING_SECONDS = 3.0
# A DeepSpeed rank has up to three launchers, each of which outlives the next: words of their command lines.
LAUNCHERS = ({"deepspeed.launcher.launch"}, {"deepspeed.launcher.runner", "deepspeed", "ds"}, {"launch"})
# When this file is imported, so before torch, which takes seconds. A fork of the process has another parent.
STARTED = os.getpid(), os.getppid()

log = logging.getLogger("esam_dist")


def hold() -> None:
    """From now on end this rank as SIGTERM does when its launcher is gone, and, before the ranks met, at a signal.

    A rank within a collective hears nothing: it is ended when the launcher's patience would be over. Without a launcher
    nothing happens. Call it when the handlers of SIGTERM and SIGINT are set, which are to ask for the stop.
    """
    if "RANK" not in os.environ:
        return
    process, parent = STARTED
    launchers = _launchers(parent if process == os.getpid() else os.getppid())
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, launchers), daemon=True).start()


def _watch(reader: int, launchers: list[int]) -> None:
    received = None
    while _alive(launchers):
        # Python's handlers have no say while the main thread waits within C++; the bytes of this pipe come at once.
        if not select.select([reader], [], [], EVERY_SECONDS)[0]:
            continue
        received = os.read(reader, 1)[0]
        if received in (signal.SIGTERM, signal.SIGINT) and not _meets():
            os._exit(128 + received)
    if received is None:
        log.warning("the launcher (process %d) is gone: stopping", launchers[0])
    os.kill(os.getpid(), signal.SIGTERM)
    if _meets():
        time.sleep(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")))
    os._exit(128 + signal.SIGTERM)


def _meets() -> bool:
    """Whether the ranks have met, or do so soon."""
    from torch.distributed import is_initialized

    end = time.monotonic() + MEETING_SECONDS
    while os.environ.get("WORLD_SIZE") != "1" and not is_initialized():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _launchers(parent: int) -> list[int]:
    """The processes that this one must not outlive: its parent, and those above it that started DeepSpeed."""
    found = [parent]
    for lower, upper in pairwise(LAUNCHERS):
        above = _parent(found[-1])
        if not lower & _words(found[-1]) or above is None or not upper & _words(above):
            break
        found.append(above)
    return found


def _alive(launchers: list[int]) -> bool:
    # By parenthood, not by number: another process may get the number of one that is gone.
    return os.getppid() == launchers[0] and all(_parent(pid) == above for pid, above in pairwise(launchers))


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _words(pid: int) -> set[str]:
    try:
        return {Path(word).name for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")}
    except OSError:
        return set()
