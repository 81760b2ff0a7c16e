"""From shards to batches on the device: torch's DataLoader, whose workers decode and whose owner normalises.

Letters: B samples per rank, S image size in pixels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from esam_dist import config
from esam_dist.data.augment import centre_crop, random_box, shifted
from esam_dist.data.dataset import SampleError, Split, open_split
from esam_dist.data.decode import ImageFile, Pixels
from esam_dist.data.order import Draw, Order, share
from esam_dist.errors import UserError

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images ready for the network, and what they show, on the device."""

    images: Tensor  # [B, 3, S, S] float32, normalised
    labels: Tensor  # [B] int64


class Skip(NamedTuple):
    """A sample that could not be used."""

    sample: int
    name: str
    reason: str
    detail: str


class Raw(NamedTuple):
    """What a worker sends: undecided about devices, as small as can be."""

    images: Tensor  # [B, S, S, 3] uint8
    labels: Tensor  # [B] int64
    flips: Tensor  # [B] bool
    skips: list[Skip]


class Samples:
    """Map-style dataset over whole draws: one call of `__getitems__` fills one batch."""

    def __init__(self, split: Split, cfg: config.Data, *, train: bool) -> None:
        self.split, self.cfg, self.train = split, cfg, train

    def __getitems__(self, draw: Draw) -> Raw:
        """Decode the samples of `draw`. In training a bad one is replaced by the next good one of the batch."""
        size, skips, good = self.cfg.image_size, [], []
        images = np.empty((len(draw.ids), size, size, 3), np.uint8)
        flips = np.zeros(len(draw.ids), np.bool_)
        for place, (sample, seed) in enumerate(zip(draw.ids.tolist(), draw.seeds.tolist(), strict=True)):
            loaded = self._try(sample, seed)
            if isinstance(loaded, Skip):
                skips.append(loaded)
            else:
                images[place], flips[place] = loaded
                good.append(place)
        # [B]: the place whose image each place shows
        shown = np.array(good, np.int64)
        if self.train and good:
            shown = shown[np.searchsorted(shown, np.arange(len(images))) % len(good)]
        if skips:
            images, flips = images[shown], flips[shown]
        labels = self.split.entries["label"][draw.ids[shown]].astype(np.int64)
        return Raw(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(flips), skips)

    def _try(self, sample: int, seed: int) -> tuple[Pixels, bool] | Skip:
        try:
            return self._load(sample, Random(seed))
        except SampleError as bad:
            return Skip(sample, self.split.describe(sample), bad.reason, bad.detail)

    def _load(self, sample: int, random: Random) -> tuple[Pixels, bool]:
        image = ImageFile(self.split.read(sample))
        cfg = self.cfg
        if not self.train:
            return centre_crop(image, cfg.image_size, cfg.crop_ratio), False
        flip = random.random() < 0.5
        if cfg.augment == "imagenet":
            return image.crop(random_box(image.width, image.height, random), cfg.image_size), flip
        pixels = centre_crop(image, cfg.image_size)
        return (shifted(pixels, random) if cfg.augment == "shift" else pixels), flip and cfg.flip


class Skipped:
    """Counts the samples that a rank could not use, names each once, and stops the run when they are too many."""

    def __init__(self, split: Split, cfg: config.Data) -> None:
        self.split, self.limit = split, cfg.max_skipped
        self.counts: dict[str, int] = {}
        self._named: set[int] = set()

    def add(self, raw: Raw) -> None:
        """Take note of the bad samples of one batch. Raises UserError."""
        for reason, count in Counter(skip.reason for skip in raw.skips).items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for skip in raw.skips:
            if skip.sample not in self._named:
                self._named.add(skip.sample)
                log.warning("skipped %s: %s %s", skip.name, skip.reason, skip.detail)
        if raw.skips and len(raw.labels) == 0:
            first = raw.skips[0]
            raise UserError(f"data.path: no sample of a whole batch can be read, {first.name} first ({first.reason})")
        if len(self._named) > self.limit * self.split.num_samples:
            raise UserError(
                f"data.max_skipped = {self.limit:g}: {len(self._named)} of {self.split.num_samples} {self.split.name} "
                f"samples cannot be read ({', '.join(sorted(self.counts))}); repair the data or raise the limit"
            )


class TrainData:
    """The training set as this rank sees it: an endless sequence of full batches from any global position."""

    def __init__(
        self, cfg: config.Data, split: Split, *, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.num_samples, self.class_names = split.num_samples, split.class_names
        self.num_classes = len(split.class_names)
        self._cfg, self._split, self._rank, self._world_size, self._device = cfg, split, rank, world_size, device
        self._order = Order(seed, split.counts, cfg.shuffle_window)
        self._skipped = Skipped(split, cfg)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples skipped on this rank so far, by reason."""
        return self._skipped.counts

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Full batches, endless, from global position `samples_seen` on. Raises UserError for too many bad samples."""
        draws = self._order.batches(
            samples_seen, batch_size=self._cfg.batch_size, rank=self._rank, world_size=self._world_size
        )
        loader = _loader(Samples(self._split, self._cfg, train=True), draws, self._cfg, self._device)
        for raw in loader:
            self._skipped.add(raw)
            yield finish(raw, self._cfg, self._device)

    def close(self) -> None:
        """Close the files; workers end with the iterator that started them."""
        self._split.close()


class ValidationData:
    """This rank's share of the validation set: over all ranks every sample exactly once."""

    def __init__(self, cfg: config.Data, split: Split, *, rank: int, world_size: int, device: torch.device) -> None:
        self.num_samples, self.num_classes = split.num_samples, len(split.class_names)
        self._cfg, self._split, self._device = cfg, split, device
        ids = np.array(share(split.num_samples, rank, world_size), np.int64)
        zeros = np.zeros_like(ids)
        starts = range(0, len(ids), cfg.batch_size)
        self._draws = [
            Draw(ids[i : i + cfg.batch_size], zeros[i : i + cfg.batch_size], zeros[i : i + cfg.batch_size].view("u8"))
            for i in starts
        ]
        self._skipped = Skipped(split, cfg)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples skipped on this rank so far, by reason."""
        return self._skipped.counts

    def batches(self) -> Iterator[Batch]:
        """One pass over this rank's share; the last batch may be smaller, and bad samples are left out."""
        for raw in _loader(Samples(self._split, self._cfg, train=False), self._draws, self._cfg, self._device):
            self._skipped.add(raw)
            yield finish(raw, self._cfg, self._device)


def open_train(cfg: config.Data, *, seed: int, rank: int, world_size: int, device: torch.device) -> TrainData:
    """Open the training split for one rank. Raises UserError, before anything is read, for whatever is wrong."""
    split = open_split(cfg.path, "train")
    if world_size * cfg.batch_size > split.num_samples:
        most = split.num_samples // world_size
        raise UserError(
            f"data.batch_size = {cfg.batch_size} on {world_size} ranks needs {world_size * cfg.batch_size} samples a "
            f"step, but {cfg.path} has {split.num_samples}; use at most {most} or fewer ranks"
        )
    return TrainData(cfg, split, seed=seed, rank=rank, world_size=world_size, device=device)


def open_validation(cfg: config.Data, *, rank: int, world_size: int, device: torch.device) -> ValidationData:
    """Open the validation split for one rank. Raises UserError for whatever is wrong."""
    return ValidationData(cfg, open_split(cfg.path, "validation"), rank=rank, world_size=world_size, device=device)


def finish(raw: Raw, cfg: config.Data, device: torch.device) -> Batch:
    """Move a batch to the device; flip and normalise it there."""
    images = raw.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    if device.type == "cpu":
        images = images.contiguous()
    flips = raw.flips.to(device, non_blocking=True).view(-1, 1, 1, 1)
    images = torch.where(flips, images.flip(-1), images).float()
    mean = torch.tensor(cfg.mean, device=device).view(1, 3, 1, 1) * 255.0
    std = torch.tensor(cfg.std, device=device).view(1, 3, 1, 1) * 255.0
    return Batch(images.sub_(mean).div_(std), raw.labels.to(device, non_blocking=True))


def _loader(samples: Samples, draws: Any, cfg: config.Data, device: torch.device) -> DataLoader[Any]:
    return DataLoader(
        samples,  # type: ignore[arg-type]  # whole draws in, whole batches out
        batch_sampler=draws,
        num_workers=cfg.workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
    )


def _as_is(raw: Any) -> Any:
    return raw
