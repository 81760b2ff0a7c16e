"""`esam-dist`, writing down which samples each rank trains on: what a launcher starts in place of the command.

RECORD names a folder. There, `drawn` tells by rank and batch which samples were read, by whatever process; `taken`
tells which batches were taken to train on. DIE_AT "RANK STEP" makes that rank kill itself when it is to take that one.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from esam_dist.cli import main
from esam_dist.data import Batch, TrainData
from esam_dist.data.order import Picks
from esam_dist.data.samples import Samples

RANK = int(os.environ["RANK"])
DIE_RANK, DIE_STEP = (int(part) for part in os.environ.get("DIE_AT", "-1 -1").split())
read, batches = Samples.__getitems__, TrainData.batches


def record(name: str, *numbers: int) -> None:
    with (Path(os.environ["RECORD"]) / f"{name}{RANK}").open("a") as file:
        file.write(" ".join(map(str, numbers)) + "\n")


def read_and_recorded(self: Samples, numbered: tuple[int, Picks]) -> object:
    number, picks = numbered
    if self.train:  # validation counts its batches from 0 too
        record("drawn", number, *picks.ids.tolist())
    return read(self, numbered)


def taken_and_recorded(self: TrainData, samples_seen: int) -> Iterator[Batch]:
    for number, batch in enumerate(batches(self, samples_seen)):
        if (RANK, number) == (DIE_RANK, DIE_STEP):
            os.kill(os.getpid(), signal.SIGKILL)
        record("taken", number)
        yield batch


Samples.__getitems__ = read_and_recorded
TrainData.batches = taken_and_recorded

if __name__ == "__main__":
    main(sys.argv[1:])
