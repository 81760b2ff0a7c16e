"""`esam-dist`, killed by its own hand in the middle of a save: what a launcher starts in place of the command.

DIE_WHEN "STEP PLACE" names the checkpoint and how far it has come; MARK a file that is there from then on, so that it
happens once. A launcher gives every rank these; only rank 0 writes.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from esam_dist.checkpoint import folder, sealed
from esam_dist.cli import main

STEP, PLACE = os.environ["DIE_WHEN"].split()
PARTIAL = f".partial_step_{int(STEP):08d}"
save, rename, sha256, write_file = torch.save, Path.rename, sealed.sha256, sealed.write_file
remove = folder._remove


def die_at(place: str, path: object, of: str = PARTIAL) -> None:
    mark = Path(os.environ["MARK"])
    if place == PLACE and of in str(path) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that is killed when half of a checkpoint is written."""

    def __init__(self, file: object) -> None:
        self.file, self.written = file, 0

    def write(self, data: bytes) -> int:
        self.written += self.file.write(data)
        if self.written > 150_000:
            self.file._file.flush()
            die_at("half", self.file._file.name)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def around_rename(path: Path, target: Path) -> Path:
    die_at("rename", path)
    renamed = rename(path, target)
    die_at("renamed", path)
    # An old one, that is no longer to be kept, has lost its name.
    die_at("prune", target, ".partial_step_")
    return renamed


def within_remove(path: Path) -> None:
    for file in path.glob("state.pt") if PLACE == "pruned half" and path.name.startswith(".partial_step_") else ():
        file.unlink()
        die_at("pruned half", path, ".partial_step_")
    remove(path)


def before_checksum(path: Path, *given: object) -> str:
    die_at("checksum", path)
    return sha256(path, *given)


def before_metadata(path: Path, content: str) -> None:
    die_at("metadata", path)
    write_file(path, content)


def save_by_halves(state: object, file: object, **options: bool) -> None:
    # Gloo's messages are saved too.
    save(state, Half(file) if isinstance(file, sealed.Hashed) else file, **options)


torch.save = save_by_halves
Path.rename = around_rename
sealed.sha256, sealed.write_file = before_checksum, before_metadata
folder._remove = within_remove

if __name__ == "__main__":
    main(sys.argv[1:])
