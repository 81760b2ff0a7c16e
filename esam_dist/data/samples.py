"""What a worker does: read, decode and augment the samples of one batch into one buffer.

Letters: B samples per rank, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from esam_dist.data.augment import Augment, centre_box
from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import ImageFile, Pixels
from esam_dist.data.keys import DataKeys
from esam_dist.data.order import Picks
from esam_dist.data.raw import MAX_BAD_IN_A_ROW, Raw, Ring, Skip
from esam_dist.data.shards import Entries

Change = Callable[[Pixels, int], None]
"""What alters the pixels of an image in place, given the sample's seed; it must be picklable, for the workers."""


class View:
    """Writes the pixels of an image as the network shall see them; `change`, if any, has the last word on each."""

    def __init__(self, cfg: DataKeys, *, train: bool) -> None:
        self.change: Change | None = None
        self._cfg = cfg
        self._augment = Augment(cfg) if train else None

    def __call__(self, data: bytes, seed: int, out: Pixels) -> None:
        """Decode `data` into `out` [S, S, 3]. Raises SampleError."""
        image = ImageFile(data)
        if self._augment is not None:
            self._augment(image, seed, out)
        else:
            image.crop(centre_box(image.width, image.height, self._cfg.crop_ratio), out)
        if self.change is not None:
            self.change(out, seed)


class Images(Protocol):
    """Image files by number, with a label each: those of a split, or others."""

    @property
    def num_samples(self) -> int:
        """How many there are."""
        ...

    @property
    def entries(self) -> Entries:
        """The label of each, in the field `label`."""
        ...

    def read(self, sample: int) -> bytes:
        """An image file. Raises SampleError."""
        ...

    def describe(self, sample: int) -> str:
        """What the log calls it."""
        ...


class Samples:
    """Map-style dataset over the picks of whole batches, numbered: one call of `__getitems__` fills one batch."""

    def __init__(self, split: Images, cfg: DataKeys, ring: Ring, *, train: bool) -> None:
        self._split, self._cfg, self._ring, self.train = split, cfg, ring, train
        self.view = View(cfg, train=train)

    def __getitems__(self, numbered: tuple[int, Picks]) -> Any:
        """The Raw of `picks`, given its number too: which slot it goes to.

        A bad sample is replaced by the next good one of the batch, or if there is none, of the set; in validation, it
        is left out.
        """
        number, picks = numbered
        size = image_size(self._cfg, picks.step_epoch) if self.train else self._cfg.image_size
        images = self._ring.images(number, len(picks.ids), size)
        ids, seeds, pixels = picks.ids.copy(), picks.seeds.tolist(), images.numpy()
        skips: list[Skip] = []
        bad = {place for place, seed in enumerate(seeds) if not self._load(ids[place], seed, pixels[place], skips)}
        while self.train and len(bad) == len(ids) and len(skips) < MAX_BAD_IN_A_ROW:
            ids[0] = (ids[0] + 1) % self._split.num_samples
            bad -= {0} if self._load(ids[0], seeds[0], pixels[0], skips) else set()
        labels = torch.from_numpy(self._split.entries["label"][ids].astype(np.int64))
        num_read = len(skips) + len(ids) - len(bad)
        numbers = None if self.train else ids
        raw = Raw(images, labels, int(picks.seeds[0] >> np.uint64(1)), skips, num_read, ids=numbers)
        return self._ring.sent(number, _without_bad(raw, bad, self.train) if bad else raw)

    def _load(self, sample: int, seed: int, out: Pixels, skips: list[Skip]) -> bool:
        """Fill one place of a batch, or say in `skips` why not."""
        try:
            self.view(self._split.read(sample), seed, out)
        except SampleError as bad:
            skips.append(Skip(self._split.describe(sample), bad.reason, bad.detail))
            return False
        return True


def image_size(cfg: DataKeys, epoch: int) -> int:
    """The size of training images in an epoch: `image_size`, or the latest entry of `progressive`."""
    size = cfg.image_size
    for start, value in cfg.progressive:
        size = int(value) if start <= epoch else size
    return size


def _without_bad(raw: Raw, bad: set[int], train: bool) -> Raw:
    """Mend `raw` in place, so that its images stay where they are: at the start of their slot."""
    shown = np.array([place for place in range(len(raw.labels)) if place not in bad], np.int64)
    if train and len(shown):
        # [B]: the place whose image each place shows; a good one shows its own, so none is read after it was changed.
        shown = shown[np.searchsorted(shown, np.arange(len(raw.labels))) % len(shown)]
    for place, other in enumerate(shown.tolist()):
        if place != other:
            raw.images[place] = raw.images[other]
    ids = None if raw.ids is None else raw.ids[shown]
    return raw._replace(images=raw.images[: len(shown)], labels=raw.labels[shown], ids=ids)
