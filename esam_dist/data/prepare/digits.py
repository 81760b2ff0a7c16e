"""scikit-learn's digits: 1,797 handwritten digits of 8x8 pixels that ship with the library, so nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from esam_dist.data.prepare.encode import png
from esam_dist.data.prepare.source import array_digest, digest_of, held_out
from esam_dist.data.prepare.write import Plan, write_dataset


def prepare_digits(out: Path, *, seed: int = 0, samples_per_shard: int = 360) -> None:
    """Write the digits below `out`: four fifths of each class for training, the rest for validation."""
    write_dataset(Digits(seed), out, Plan(seed=seed, samples_per_shard=samples_per_shard))


class Digits:
    """The digits as a source, split by class and seed."""

    name = "digits"
    class_names = tuple("0123456789")

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = np.rint(data.images * (255 / 16)).astype(np.uint8)
        self._ids = held_out(data.target, 0.2, seed)
        self.labels = {split: data.target[ids].tolist() for split, ids in self._ids.items()}
        self.digest = digest_of([self.class_names, self.labels, array_digest(self._images)])

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """A digit as a greyscale PNG."""
        return png(Image.fromarray(self._images[self._ids[split][sample]]))

    def describe(self, split: str, sample: int) -> str:
        """The number of a digit."""
        return f"digit {self._ids[split][sample]}"
