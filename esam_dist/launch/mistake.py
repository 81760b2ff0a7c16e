"""How a rank says what the user got wrong: one line, once, and again where torchrun sums up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from esam_dist.errors import UserError

SECONDS = 2.0


def say(error: UserError) -> None:
    """Write the line of `error` to standard error; ranks but the first leave rank 0 time to say it for all."""
    given = os.environ.get("RANK", "")
    rank = int(given) if given.isdecimal() else 0  # else it is what the user got wrong
    if rank > 0:
        # Most errors are alike on all ranks, and the launcher ends us when rank 0 has said it: at once, by this.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS)
    line = f"esam-dist: error: {f'rank {rank}: ' if rank else ''}{error}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201
    _tell_torchrun(line)


def _tell_torchrun(line: str) -> None:
    # torchrun ends with thirty lines about the rank that failed first, and shows there what this file holds.
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    told = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        if path:
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": told}}))
