"""A part of a prepared training set, held out from the rest: to choose values on, before the test images are seen."""

from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np

from esam_dist.data.dataset import open_split, read_description
from esam_dist.data.prepare.source import digest_of, held_out


class HeldOut:
    """The training images of `root` as a source: `share` of each class, drawn by the seed, becomes its validation."""

    def __init__(self, root: Path, share: float, seed: int = 0) -> None:
        """Raises UserError where `root` is no dataset."""
        self._split = open_split(root, "train")
        labels = self._split.entries["label"]
        self._ids = held_out(labels.tolist(), share, seed)
        self.name = f"{read_description(root).name}, {share:g} of its training images held out"
        self.class_names = self._split.class_names
        self.labels = {split: labels[ids].tolist() for split, ids in self._ids.items()}
        self.digest = digest_of([self.class_names, self.labels, np.bitwise_xor.reduce(self._split.entries["crc32"])])

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """The image file of a sample, as it is stored, and its suffix. Raises SampleError."""
        number = int(self._ids[split][sample])
        return self._split.read(number), PurePath(self._split.describe(number)).suffix.removeprefix(".")

    def describe(self, split: str, sample: int) -> str:
        """Shard and member name of a sample."""
        return self._split.describe(int(self._ids[split][sample]))
