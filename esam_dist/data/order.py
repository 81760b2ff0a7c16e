"""Who reads what, when: the global order of the samples, as a pure function.

The global sequence is the concatenation of the epochs' permutations: position p belongs to epoch p // N, where N is
the number of samples. Global batch k of W ranks with B samples each is the next W * B positions, straddling an epoch's
end; rank r takes the r-th slice of B. Nothing here depends on W, B or the number of workers, so `samples_seen` is all
that a run needs to continue, whatever those become.

Letters: N samples in the set, B samples per rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Keys = NDArray[np.uint64]

_SHARDS, _SAMPLES, _AUGMENT = 1, 2, 3


class Picks(NamedTuple):
    """The samples of one batch: which, in which epoch, and the seeds of their augmentation."""

    ids: Ids  # [B]
    epochs: Ids  # [B]
    seeds: Keys  # [B]
    step_epoch: int
    """The epoch in which the global batch begins: the same on all ranks."""


class Drawn(NamedTuple):
    """The samples of one epoch in order, and numbers that tell the draws of one sample apart."""

    ids: Ids  # [N]
    turns: Ids  # [N]


def mix(*parts: int | Ids) -> Keys:
    """Hash integers to 64 well mixed bits, elementwise: splitmix64's finaliser, chained over `parts`.

    For fixed leading parts it is a bijection of the last one, so sorting by it is a permutation without ties. Unlike
    `numpy.random.Generator`, whose streams may change between releases, it gives the same numbers for ever.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = (state + np.uint64(0x9E3779B97F4A7C15)) ^ np.atleast_1d(np.asarray(part)).astype(np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permutation(seed: int, epoch: int, counts: Sequence[int], window: int) -> Ids:
    """The order of one epoch: shards shuffled, then samples shuffled within each `window` consecutive shards.

    `counts` holds the number of samples of each shard; ids count through the shards in their given order.
    """
    num_samples = int(sum(counts))
    return shuffled(seed, epoch, np.arange(num_samples), windows(seed, epoch, counts, window))


def windows(seed: int, epoch: int, counts: Sequence[int], window: int) -> Ids:
    """The window of each sample [N] in one epoch: that many shards in a row, once shards are shuffled."""
    shard_order = np.argsort(mix(seed, epoch, _SHARDS, np.arange(len(counts))))
    place = np.empty(len(counts), np.int64)
    place[shard_order] = np.arange(len(counts))
    return np.repeat(place // window, np.asarray(counts, np.int64))


def shuffled(seed: int, epoch: int, ids: Ids, window_of_sample: Ids) -> Ids:
    """The order in which the draws `ids` are read, as places in it: by window, and shuffled within each."""
    keys = mix(seed, epoch, _SAMPLES, np.arange(len(ids)))
    return np.lexsort((keys, window_of_sample[ids])).astype(np.int64)


@dataclass
class Order:
    """The endless global sequence over shards of `counts` samples.

    With `repeats` (repeated augmentation, Hoffer et al. 2020), each sample takes that many positions in a row.
    """

    seed: int
    counts: Sequence[int]
    window: int
    repeats: int = 1

    def __post_init__(self) -> None:
        self.num_samples = int(sum(self.counts))
        self._cache: dict[int, Drawn] = {}

    def picks(self, start: int, count: int) -> Picks:
        """The samples at global positions `start` to `start + count`."""
        positions, repeat = np.divmod(np.arange(start, start + count, dtype=np.int64), self.repeats)
        epochs, offsets = np.divmod(positions, self.num_samples)
        ids, turns = np.empty_like(offsets), np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here, drawn = epochs == epoch, self._epoch(int(epoch))
            ids[here], turns[here] = drawn.ids[offsets[here]], drawn.turns[offsets[here]]
        views = mix(self.seed, _AUGMENT, epochs, ids, repeat + self.repeats * turns)
        return Picks(ids, epochs, views, start // self.num_samples)

    def batches(self, samples_seen: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[Picks]:
        """This rank's slice of every global batch from position `samples_seen` on, endless."""
        start = samples_seen
        while True:
            picks = self.picks(start + rank * batch_size, batch_size)
            yield picks._replace(step_epoch=start // self.num_samples)
            start += world_size * batch_size

    def draw(self, epoch: int) -> Drawn:
        """The samples of one epoch, in order."""
        return Drawn(permutation(self.seed, epoch, self.counts, self.window), np.broadcast_to(0, self.num_samples))

    def _epoch(self, epoch: int) -> Drawn:
        if epoch not in self._cache:
            # A batch straddles at most an epoch's end: the latest two suffice.
            while len(self._cache) >= 2:
                del self._cache[min(self._cache)]
            self._cache[epoch] = self.draw(epoch)
        return self._cache[epoch]


def share(num_samples: int, rank: int, world_size: int) -> range:
    """The samples that `rank` validates: contiguous, disjoint over ranks, complete; empty for some if too few."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)
