"""scikit-learn's digits: 1,797 handwritten digits of 8x8 pixels that ship with the library, so nothing is fetched."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from esam_dist.data.order import mix
from esam_dist.data.prepare.write import write_dataset

_SPLIT = 12


def prepare_digits(out: Path, *, seed: int = 0, samples_per_shard: int = 360) -> None:
    """Write the digits below `out`: four fifths of each class for training, the rest for validation."""
    write_dataset(Digits(seed), out, seed=seed, samples_per_shard=samples_per_shard)


class Digits:
    """The digits as a source, split by class and seed."""

    name = "digits"
    class_names = tuple("0123456789")

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = np.rint(data.images * (255 / 16)).astype(np.uint8)
        held_out = np.zeros(len(data.target), np.bool_)
        for digit in range(10):
            ids = np.flatnonzero(data.target == digit)
            shuffled = ids[np.argsort(mix(seed, _SPLIT, ids))]
            held_out[shuffled[: round(len(ids) / 5)]] = True
        self._ids = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
        self.labels = {split: data.target[ids].tolist() for split, ids in self._ids.items()}

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """A digit as a greyscale PNG."""
        file = io.BytesIO()
        Image.fromarray(self._images[self._ids[split][sample]]).save(file, "PNG")
        return file.getvalue(), "png"
