"""What a worker does: read, decode and augment the samples of one batch into one buffer.

Letters: B samples per rank, S image size in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esam_dist import config
from esam_dist.data.augment import Augment, centre_box
from esam_dist.data.dataset import SampleError, Split
from esam_dist.data.decode import ImageFile, Pixels
from esam_dist.data.order import Draw


class Skip(NamedTuple):
    """A sample that could not be used."""

    name: str
    reason: str
    detail: str


class Raw(NamedTuple):
    """A batch as workers send it: bytes, not floats, and no device."""

    images: Tensor  # [B, S, S, 3] uint8
    labels: Tensor  # [B] int64
    seed: int
    """Of what concerns the batch as a whole: mixup and CutMix."""
    skips: list[Skip]


class View:
    """Writes the pixels of an image as the network shall see them."""

    def __init__(self, cfg: config.Data, *, train: bool) -> None:
        self._cfg = cfg
        self._augment = Augment(cfg) if train else None

    def __call__(self, data: bytes, seed: int, out: Pixels) -> None:
        """Decode `data` into `out` [S, S, 3]. Raises SampleError."""
        image = ImageFile(data)
        if self._augment is not None:
            self._augment(image, seed, out)
        else:
            image.crop(centre_box(image.width, image.height, self._cfg.crop_ratio), out)


class Samples:
    """Map-style dataset over whole draws: one call of `__getitems__` fills one batch."""

    def __init__(self, split: Split, cfg: config.Data, *, train: bool) -> None:
        self._split, self._cfg, self._train = split, cfg, train
        self._view = View(cfg, train=train)

    def __getitems__(self, draw: Draw) -> Raw:
        """The batch of `draw`. A bad sample is replaced by the next good one of the batch; in validation, left out."""
        size = image_size(self._cfg, draw.step_epoch) if self._train else self._cfg.image_size
        images = pixel_buffer(len(draw.ids), size)
        good: list[int] = []
        skips: list[Skip] = []
        for place, (sample, seed) in enumerate(zip(draw.ids.tolist(), draw.seeds.tolist(), strict=True)):
            skip = self._load(sample, seed, images[place].numpy())
            if skip is None:
                good.append(place)
            else:
                skips.append(skip)
        labels = torch.from_numpy(self._split.entries["label"][draw.ids].astype(np.int64))
        raw = Raw(images, labels, int(draw.seeds[0] >> np.uint64(1)), skips)
        return _without_bad(raw, good, self._train) if skips else raw

    def _load(self, sample: int, seed: int, out: Pixels) -> Skip | None:
        try:
            self._view(self._split.read(sample), seed, out)
        except SampleError as bad:
            return Skip(self._split.describe(sample), bad.reason, bad.detail)
        return None


def image_size(cfg: config.Data, epoch: int) -> int:
    """The size of training images in an epoch: `image_size`, or the latest entry of `progressive`."""
    size = cfg.image_size
    for start, value in cfg.progressive:
        size = int(value) if start <= epoch else size
    return size


def pixel_buffer(num_images: int, size: int) -> Tensor:
    """Room for a batch, [B, S, S, 3] uint8; in a worker, where the main process can see it without a copy."""
    length = num_images * size * size * 3
    if torch.utils.data.get_worker_info() is None:
        return torch.empty((num_images, size, size, 3), dtype=torch.uint8)
    # As torch's own collation does; a tensor allocated otherwise would be copied when it is sent.
    storage = torch.UntypedStorage._new_shared(length)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(num_images, size, size, 3)


def _without_bad(raw: Raw, good: list[int], train: bool) -> Raw:
    # [B]: the place whose image each place shows
    shown = np.array(good, np.int64)
    if train and good:
        shown = shown[np.searchsorted(shown, np.arange(len(raw.labels))) % len(good)]
    return raw._replace(images=raw.images[shown], labels=raw.labels[shown])
