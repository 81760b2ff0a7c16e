"""Image files of anyone's, as validation sees its samples: the same workers, decoder, crop and arithmetic."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import SUFFIXES
from esam_dist.data.device import Batch, Finish
from esam_dist.data.keys import DataKeys
from esam_dist.data.loader import load
from esam_dist.data.open_files import open_regular
from esam_dist.data.order import Picks
from esam_dist.data.prepare.listing import TOOL_FOLDERS
from esam_dist.data.raw import Raw, Skip
from esam_dist.data.shards import ENTRY
from esam_dist.errors import UserError, printable

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
"""A larger file is none that a camera or a program would write."""


class Files:
    """Image files in the place of a split's samples; the label of each is its number."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self.num_samples = len(paths)
        self.entries = np.zeros(len(paths), ENTRY)
        self.entries["label"] = np.arange(len(paths))

    def read(self, sample: int) -> bytes:
        """The contents of a file. Raises SampleError."""
        try:
            with open(self._paths[sample], "rb", opener=open_regular) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise SampleError("too_large", f"{size} bytes")
                data = file.read()
        except OSError as error:
            raise SampleError("unreadable", str(error.strerror)) from None
        if not data:
            raise SampleError("empty")
        return data

    def describe(self, sample: int) -> str:
        """The path of a file."""
        return str(self._paths[sample])


def find(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the image files below the folders among them, each folder's in order.

    Hidden files, and folders that programs leave behind, are passed over. Raises UserError for a path that is not
    there, and where there is no file at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += _below(path)
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise UserError(f"PATHS: {printable(str(path))}: no such file or folder; give image files, or folders")
    if not found:
        raise UserError(f"PATHS: no image files there; their names end in {', '.join(sorted(SUFFIXES))}")
    return found


def batches(files: Files, cfg: DataKeys, device: torch.device, take_note: Callable[[Raw], None]) -> Iterator[Batch]:
    """The images of all files in batches, in order, with the numbers of the files as labels.

    Files that are no images are left out. `take_note` is told of each batch as it comes from the workers. Raises
    UserError where there is no room for so many workers.
    """
    numbers = np.arange(files.num_samples, dtype=np.int64)
    parts = [numbers[start : start + cfg.batch_size] for start in range(0, len(numbers), cfg.batch_size)]
    picks = [Picks(part, np.zeros_like(part), np.zeros(len(part), np.uint64), 0) for part in parts]
    finish = Finish(cfg, device, files.num_samples, train=False)
    try:
        raws = load(files, cfg, picks, train=False, pin=device.type == "cuda")
    except UserError as error:  # no room for what the workers share
        raise UserError(str(error).replace("data.workers = ", "--workers ", 1)) from None
    return finish(_with_images(raws, take_note))


def say_skipped(skips: Iterable[Skip]) -> None:
    """Name files that are no images."""
    for skip in skips:
        log.warning("passed over %s", skip.line())


def _with_images(raws: Iterable[Raw], take_note: Callable[[Raw], None]) -> Iterator[Raw]:
    for raw in raws:
        take_note(raw)
        if len(raw.labels):
            yield raw


def _below(folder: Path) -> Iterator[Path]:
    """Links to files are followed, those to folders are not: they may lead round in circles."""

    def unreadable(error: OSError) -> None:
        log.warning("passed over %s (%s)", printable(str(error.filename)), error.strerror)

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in TOOL_FOLDERS)
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(place, name)
