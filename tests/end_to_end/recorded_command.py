"""`esam-dist`, writing down which samples each rank reads: what a launcher starts in place of the command.

RECORD names a folder; DIE_AT "RANK STEP" makes that rank kill itself when it is to read that step's batch.
"""

import os
import signal
import sys
from pathlib import Path

from esam_dist.cli import main
from esam_dist.data.order import Draw
from esam_dist.data.samples import Samples

RANK = int(os.environ["RANK"])
DIE_RANK, DIE_STEP = (int(part) for part in os.environ.get("DIE_AT", "-1 -1").split())
read = Samples.__getitems__
steps = 0


def recorded(self: Samples, numbered: tuple[int, Draw]) -> object:
    global steps  # noqa: PLW0603
    _, draw = numbered
    # Validation draws have no augmentation.
    if draw.seeds.any():
        if (RANK, steps) == (DIE_RANK, DIE_STEP):
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(os.environ["RECORD"]) / f"rank{RANK}").open("a") as file:
            file.write(" ".join(map(str, draw.ids)) + "\n")
        steps += 1
    return read(self, numbered)


if __name__ == "__main__":
    Samples.__getitems__ = recorded
    main(sys.argv[1:])
