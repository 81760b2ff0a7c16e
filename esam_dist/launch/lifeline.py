"""A rank ends with its launcher, and before training has begun at once at a signal, wherever it waits.

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
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType

from esam_dist.lock import release_all

EVERY_SECONDS = 1.0
# So long a rank has to end in order at a signal before training. Longer may be in vain: it waits within C++.
ENDING_SECONDS = 3.0
# A DeepSpeed rank has up to three launchers, each of which outlives the next: words of their command lines.
LAUNCHERS = ({"deepspeed.launcher.launch"}, {"deepspeed.launcher.runner", "deepspeed", "ds"}, {"launch"})
# When this file is imported, so before torch, which takes seconds. A fork of the process has another parent.
STARTED = os.getpid(), os.getppid()

Handler = Callable[[int, FrameType | None], object]
log = logging.getLogger("esam_dist")
_has_begun = threading.Event()


def hold() -> None:
    """From now on end this rank as SIGTERM does when its launcher is gone, and, until `begun` is called, at a signal.

    A rank within a collective hears nothing: it is ended when the launcher's patience would be over. Call it when the
    handlers of SIGTERM and SIGINT are set, which are to ask for the stop when training has begun.
    """
    _has_begun.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if callable(handler):
            signal.signal(number, _ending(handler, os.getpid()))
    if "RANK" not in os.environ:
        return
    process, parent = STARTED
    launchers = _launchers(parent if process == os.getpid() else os.getppid())
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, launchers), daemon=True).start()


def begun() -> None:
    """Say that all ranks train: from now on there is something to save, and a signal asks for a stop in order."""
    _has_begun.set()


def _watch(reader: int, launchers: list[int]) -> None:
    received = None
    while _alive(launchers):
        # Python's handlers have no say while the main thread waits within C++; the bytes of this pipe come at once.
        if not select.select([reader], [], [], EVERY_SECONDS)[0]:
            continue
        received = os.read(reader, 1)[0]
        if received in (signal.SIGTERM, signal.SIGINT):
            _end_before_training(received)
    if received is None:
        log.warning("the launcher (process %d) is gone: stopping", launchers[0])
    os.kill(os.getpid(), signal.SIGTERM)
    _end_before_training(signal.SIGTERM)
    time.sleep(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")))
    os._exit(128 + signal.SIGTERM)


def _ending(then: Handler, process: int) -> Handler:
    """A handler that ends this process in order before training has begun, and does as `then` afterwards."""

    def handle(number: int, frame: FrameType | None) -> object:
        # Loader processes have a copy of it, and are not what is to end.
        if _has_begun.is_set() or os.getpid() != process:
            return then(number, frame)
        raise SystemExit(128 + number)

    return handle


def _end_before_training(number: int) -> None:
    """Before training has begun: end this process, whose main thread may never hear of the signal."""
    if _has_begun.wait(ENDING_SECONDS):
        return
    release_all()
    os._exit(128 + number)


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
