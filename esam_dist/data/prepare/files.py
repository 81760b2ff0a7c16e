"""Images in files of their own, or in archives that are read in place."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import SUFFIXES
from esam_dist.data.prepare.source import digest_of
from esam_dist.errors import UserError


class Span(NamedTuple):
    """An image file: bytes of a file, all of them or some."""

    path: Path
    offset: int
    length: int
    suffix: str


class FileSource:
    """Labelled image files below `root`: pairs of label and place, by split."""

    def __init__(
        self, name: str, root: Path, class_names: Sequence[str], samples: Mapping[str, Sequence[tuple[int, Span]]]
    ) -> None:
        self.name, self.class_names = name, tuple(class_names)
        self.labels = {split: [label for label, _ in pairs] for split, pairs in samples.items()}
        self._spans = {split: [span for _, span in pairs] for split, pairs in samples.items()}
        places = (
            f"{span.path.relative_to(root)} {span.offset} {span.length}"
            for spans in self._spans.values()
            for span in spans
        )
        self.digest = digest_of(itertools.chain([self.class_names, self.labels], places))

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """An image file. Raises SampleError when it is empty, cut short or cannot be read."""
        span = self._spans[split][sample]
        try:
            with span.path.open("rb") as file:
                data = os.pread(file.fileno(), span.length, span.offset)
        except OSError as error:
            raise SampleError("unreadable", f"{span.path}: {error.strerror}") from None
        if not data:
            raise SampleError("empty", f"{span.path} at {span.offset}")
        if len(data) != span.length:
            raise SampleError("truncated", f"{span.path} at {span.offset}")
        return data, span.suffix


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder`, in order: a class each. Raises UserError for one that cannot be printed."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if strange := [name for name in names if not name.isprintable()]:
        raise UserError(f"--from {folder}: the folder {strange[0]!r} has no name that can be printed; rename it")
    return tuple(names)


def class_files(folder: Path, class_names: Sequence[str]) -> list[tuple[int, Span]]:
    """The image files below each class's folder, in order, with their labels.

    Raises UserError when there are none, or `folder` has a class that is none of `class_names`.
    """
    if unknown := set(class_folders(folder)) - set(class_names):
        raise UserError(f"--from {folder}: has the class {min(unknown)!r}, which training has not; rename or remove it")
    samples = [
        (label, Span(path, 0, path.stat().st_size if path.exists() else 0, image_suffix(path)))
        for label, name in enumerate(class_names)
        for path in _images(folder / name)
    ]
    if not samples:
        raise UserError(f"--from {folder}: holds no folders with images; give a folder with one folder per class")
    return samples


def image_suffix(path: PurePath) -> str:
    """How the image of that name is called in a shard: `jpg` for all JPEGs."""
    suffix = path.suffix.lower().lstrip(".")
    return "jpg" if suffix == "jpeg" else suffix


def _images(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
