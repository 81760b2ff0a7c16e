"""SIGTERM and Ctrl-C while there are no ranks yet: the launch ends at once, wherever it waits."""

from __future__ import annotations

import os
import signal
import threading


def end_on_signals() -> None:
    """SIGTERM and SIGINT end this process with status 128 + signal, until another handler is set for them.

    torchrun's agent sets its own when it starts the ranks. Before, it waits for the other nodes within C++, where
    Python's handlers have no say; and process 1 of a container ignores a signal that has none. So a thread looks too.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    while received := os.read(reader, 1):
        if signal.getsignal(received[0]) is _end:
            _end(received[0], None)


def _end(number: int, _: object) -> None:
    os._exit(128 + number)
