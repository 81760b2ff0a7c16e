"""Raw batches, and the shared memory in which workers hand them to the process that trains.

Letters: B samples per rank, S image size in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from numpy.typing import NDArray
from torch import Tensor

from esam_dist import config

AHEAD = 2
"""Batches that each worker is asked for in advance: the DataLoader's `prefetch_factor`."""


class Skip(NamedTuple):
    """A sample that could not be used."""

    name: str
    reason: str
    detail: str


class Raw(NamedTuple):
    """A batch as workers send it: bytes, not floats, and no device.

    Filled by a worker, its images stay as they are until the batch after the next is asked for, or another pass begins
    (see Ring); pinned, or without workers, they have memory of their own.
    """

    images: Tensor  # [B, S, S, 3] uint8
    labels: Tensor  # [B] int64
    seed: int
    """Of what concerns the batch as a whole: mixup and CutMix."""
    skips: list[Skip]


class Ring:
    """Room for the images of batches, which the workers of one DataLoader fill in turn, and the owner looks into.

    Fresh shared memory for every batch would cost a page fault per page in the worker and in the owner. Batch n lies in
    slot n % (P + 2), where P = AHEAD * workers: torch's DataLoader orders batch n + P from a worker just before it
    returns batch n, in order, so at most n to n + P are being filled, or wait; n - 1 is left alone. Its pinning
    thread has copied batch n before the DataLoader can return it. Persistent workers finish what an abandoned
    pass ordered before the next pass orders anything. Two iterators that live at once need a ring each.
    """

    def __init__(self, cfg: config.Data, workers: int) -> None:
        size = max([cfg.image_size, *(int(size) for _, size in cfg.progressive)])
        self._slots = AHEAD * workers + 2 if workers else 0
        self._length = cfg.batch_size * size * size * 3
        # As torch's own collation does, so that it may be sent to spawned workers; pages come when they are written.
        storage = torch.UntypedStorage._new_shared(self._slots * self._length)  # type: ignore[no-untyped-call]
        self._memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._key = next(_keys)
        _rings[self._key] = self

    def images(self, number: int, num_images: int, size: int) -> Tensor:
        """Room for the images of batch `number`, [B, S, S, 3] uint8: its slot, or without workers fresh memory."""
        shape = (num_images, size, size, 3)
        if not self._slots:
            return torch.empty(shape, dtype=torch.uint8)
        start, length = number % self._slots * self._length, num_images * size * size * 3
        assert length <= self._length
        return self._memory[start : start + length].view(shape)

    def sent(self, number: int, raw: Raw) -> Any:
        """What a worker returns so that the owner gets `raw`, whose images begin the slot of batch `number`."""
        return _Sent(self._key, number, raw) if self._slots else raw


_keys = itertools.count()
_rings: WeakValueDictionary[int, Ring] = WeakValueDictionary()


@dataclass(frozen=True)
class _Sent:
    """A raw batch on its way: pickled without its images, it is unpickled as a Raw that looks into the owner's ring."""

    key: int
    number: int
    raw: Raw

    def __reduce__(self) -> tuple[Callable[..., Raw], tuple[Any, ...]]:
        # Labels as an array: every tensor that is sent takes shared memory and a file descriptor of its own.
        images, labels, seed, skips = self.raw
        return _received, (self.key, self.number, *images.shape[:2], labels.numpy(), seed, skips)


def _received(key: int, number: int, num_images: int, size: int, labels: NDArray[Any], seed: int, skips: Any) -> Raw:
    return Raw(_rings[key].images(number, num_images, size), torch.from_numpy(labels), seed, skips)
