"""The request to stop, which signals make and the loop answers after an update, or within a validation."""

from __future__ import annotations

import os
import signal
from types import FrameType

ASKED = "{} received: stopping after this update, with a checkpoint{}\n"
AT_ONCE = "; Ctrl-C again ends at once, without one"


class Stop:
    """SIGTERM and the first Ctrl-C ask for an orderly stop; a second Ctrl-C ends the process."""

    def __init__(self) -> None:
        self._received: list[int] = []

    @staticmethod
    def on_signals() -> Stop:
        """One that listens from now on."""
        stop = Stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop._note)
        return stop

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self._received)

    @property
    def number(self) -> int:
        """The first signal; SIGTERM where another rank has received it."""
        return self._received[0] if self._received else signal.SIGTERM

    @property
    def status(self) -> int:
        """The exit status of a process that it ended, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._received and os.environ.get("RANK", "0") == "0":
            # Not by `logging` or `print`: a handler may come while either writes.
            told = ASKED.format(signal.Signals(number).name, AT_ONCE if number == signal.SIGINT else "")
            os.write(2, b"\n" * os.isatty(2) + told.encode())
        self._received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
