"""Images in files of their own, or in archives that are read in place."""

from __future__ import annotations

import hashlib
import itertools
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from esam_dist.data.dataset import SampleError
from esam_dist.data.open_files import open_regular
from esam_dist.data.prepare.listing import Listing
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
            with open(span.path, "rb", opener=open_regular) as file:
                data = os.pread(file.fileno(), span.length, span.offset)
        except OSError as error:
            raise SampleError("unreadable", str(error.strerror)) from None
        if not data:
            raise SampleError("empty")
        if len(data) != span.length:
            raise SampleError("truncated", f"{len(data)} of {span.length} bytes")
        return data, span.suffix

    def describe(self, split: str, sample: int) -> str:
        """The path of an image, and in an archive, at which byte it begins."""
        span = self._spans[split][sample]
        return f"{span.path} at {span.offset}" if span.offset else str(span.path)


def class_files(
    listing: Listing, folder: Path, class_names: Sequence[str], limit: int | None = None
) -> list[tuple[int, Span]]:
    """The image files below each class's folder, in order, with their labels; at most `limit` of each class.

    Raises UserError when there are none, also of one class, or `folder` has a class that is none of `class_names`.
    """
    found = listing.folders(folder)
    names = [class_name(name) for name in found]
    if unknown := set(names) - set(class_names):
        raise UserError(f"--from {folder}: has the class {min(unknown)!r}, which training has not; rename or remove it")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"--from {folder}: has two folders {twice[0]!r}, whose letters are composed otherwise; put them together"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    samples = []
    for name in found:
        images = listing.images(folder / name)
        if not images:
            raise UserError(
                f"--from {folder}: the class folder {name!r} holds no images; put images there, or remove it"
            )
        samples += [(labels[class_name(name)], _span(path)) for path in _limited(images, folder, limit)]
    if not samples:
        raise UserError(f"--from {folder}: holds no folders with images; give a folder with one folder per class")
    return samples


def class_name(folder: str) -> str:
    """The class of a folder: macOS writes letters with accents in two parts, others in one, and they are the same."""
    return unicodedata.normalize("NFC", folder)


def _limited(images: Sequence[Path], folder: Path, limit: int | None) -> Sequence[Path]:
    """The first by a hash of their names: nearly the same when images are added, and not all of one film or day."""
    if limit is None:
        return images
    names = {path: os.fsencode(path.relative_to(folder)) for path in images}
    return sorted(sorted(images, key=lambda path: hashlib.sha256(names[path]).digest())[:limit])


def _span(path: Path) -> Span:
    return Span(path, 0, path.stat().st_size, image_suffix(path))


def image_suffix(path: PurePath) -> str:
    """How the image of that name is called in a shard: `jpg` for all JPEGs."""
    suffix = path.suffix.lower().lstrip(".")
    return "jpg" if suffix == "jpeg" else suffix
