"""Raw batches, and the shared memory in which workers hand them to the process that trains.

Letters: B samples per rank, S image size in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError, printable

AHEAD = 2
"""Batches that each worker is asked for in advance: the DataLoader's `prefetch_factor`."""


MAX_BAD_IN_A_ROW = 64
"""So many bad samples without a good one between them leave a batch empty, which stops a run."""


class Skip(NamedTuple):
    """A sample that could not be used, or a shard as a whole."""

    name: str
    reason: str
    detail: str

    def line(self) -> str:
        """For the log."""
        return printable(f"{self.name} ({self.reason}{self.detail and ': '}{self.detail})")


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
    num_read: int
    """Samples that were looked at for it, good and bad."""
    ids: NDArray[np.int64] | None = None  # [B]
    """In validation: which samples of the split they are."""
    keys: tuple[str, ...] = ()
    """Of a stream: shard and key of each sample, [B]. An index tells those of its samples from their place."""


class Ring:
    """Room for the images of batches, which the workers of one DataLoader fill in turn, and the owner looks into.

    Fresh shared memory for every batch would cost its zeroing, and a fault per page in the worker and in the owner;
    this is taken once, as a whole, when the ring is made. Raises UserError when there is not so much. Batch n lies in
    slot n % (P + 2), where P = AHEAD * workers: torch's DataLoader orders batch n + P from a worker just before it
    returns batch n, in order, so at most n to n + P are being filled, or wait; n - 1 is left alone. Its pinning
    thread has copied batch n before the DataLoader can return it. Persistent workers finish what an abandoned
    pass ordered before the next pass orders anything. Two iterators that live at once need a ring each.
    """

    def __init__(self, cfg: DataKeys, workers: int) -> None:
        self._slots, self._length = _room(cfg, workers)
        self._memory = _shared_bytes(self._slots * self._length, cfg, workers) if workers else torch.empty(0)
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


def ring_bytes(cfg: DataKeys, workers: int) -> int:
    """Shared memory that a ring takes."""
    slots, length = _room(cfg, workers)
    return slots * length


def _room(cfg: DataKeys, workers: int) -> tuple[int, int]:
    """Slots, and the bytes of each."""
    size = max([cfg.image_size, *(int(size) for _, size in cfg.progressive)])
    return AHEAD * workers + 2 if workers else 0, cfg.batch_size * size * size * 3


_keys = itertools.count()
_rings: WeakValueDictionary[int, Ring] = WeakValueDictionary()


@dataclass(frozen=True)
class _Sent:
    """A raw batch on its way: pickled without its images, it is unpickled as a Raw that looks into the owner's ring."""

    key: int
    number: int
    raw: Raw

    def __reduce__(self) -> tuple[Callable[..., Raw | None], tuple[Any, ...]]:
        # Labels as an array: every tensor that is sent takes shared memory and a file descriptor of its own.
        images, labels, *rest = self.raw
        return _received, (self.key, self.number, *images.shape[:2], labels.numpy(), *rest)


def _received(key: int, number: int, num_images: int, size: int, labels: NDArray[Any], *rest: Any) -> Raw | None:
    ring = _rings.get(key)
    if ring is None:
        # The iterator holds its ring, so nobody waits for this batch: torch's pinning thread still reads while garbage
        # is collected, where weak references end first. An error would end the thread with a traceback.
        return None
    return Raw(ring.images(number, num_images, size), torch.from_numpy(labels), *rest)


def _shared_bytes(length: int, cfg: DataKeys, workers: int) -> Tensor:
    """Shared memory as torch's own collation takes it, so that it can be sent to spawned workers: [length] uint8."""
    try:
        storage = torch.UntypedStorage._new_shared(length)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(
            f"data.workers = {workers}: they need {length / 2**20:.0f} MiB of shared memory for batches of "
            f"{cfg.batch_size} images ({str(error).rpartition(': ')[2]}); use fewer, smaller batches, or give more "
            "(a larger /dev/shm; docker run --shm-size)"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)
