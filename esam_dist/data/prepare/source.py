"""What can be prepared: labelled images of any origin, and how a set without a validation split is divided."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from esam_dist.data.order import Ids, mix

_SPLIT = 12


class Source(Protocol):
    """Labelled images: which there are is known at once, their files are read one by one, in any process."""

    @property
    def name(self) -> str:
        """What the dataset is called in `dataset.json`."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The name of each label."""
        ...

    @property
    def labels(self) -> Mapping[str, Sequence[int]]:
        """The label of every sample, by split."""
        ...

    @property
    def digest(self) -> str:
        """A checksum of what the source holds, labels included, so that a restart does not mix two sources."""
        ...

    def read(self, split: str, sample: int) -> tuple[bytes, str]:
        """The image file of a sample, and its suffix. Raises SampleError."""
        ...

    def describe(self, split: str, sample: int) -> str:
        """What the source calls a sample, for the log: the name of its file, if it has one."""
        ...


def held_out(labels: Sequence[int], share: float, seed: int) -> dict[str, Ids]:
    """Divide samples into `train` and `validation`: the same share of every class, drawn by the seed.

    At least one sample of each class stays in training.
    """
    array = np.asarray(labels)
    kept = np.ones(len(array), np.bool_)
    for label in np.unique(array):
        ids = np.flatnonzero(array == label)
        shuffled = ids[np.argsort(mix(seed, _SPLIT, ids))]
        kept[shuffled[: min(round(len(ids) * share), len(ids) - 1)]] = False
    return {"train": np.flatnonzero(kept), "validation": np.flatnonzero(~kept)}


def digest_of(parts: Iterable[object]) -> str:
    """A checksum of the text of `parts`: classes, labels, and what tells the images from others."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def array_digest(array: NDArray[Any]) -> str:
    """A checksum of the contents of `array`."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
