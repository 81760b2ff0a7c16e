"""From raw batches to batches on the device: normalised and mixed there, one ahead of the network.

Letters: B samples per rank, K classes, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esam_dist.data.augment import mixing
from esam_dist.data.keys import DataKeys
from esam_dist.data.raw import Raw

_FEW = 8


class Batch(NamedTuple):
    """Images ready for the network, and what they show, on the device."""

    images: Tensor  # [B, 3, S, S] float32, normalised
    labels: Tensor  # [B] int64, or [B, K] float32 with mixup or CutMix


class Finish:
    """Turns raw batches into batches on one device."""

    def __init__(self, cfg: DataKeys, device: torch.device, num_classes: int, *, train: bool) -> None:
        self._device = device
        self._mean = torch.tensor(cfg.mean, device=device).view(1, 3, 1, 1) * 255.0
        self._std = torch.tensor(cfg.std, device=device).view(1, 3, 1, 1) * 255.0
        self._mix = mixing(cfg, num_classes) if train else None

    def __call__(self, raws: Iterable[Raw]) -> Iterator[Batch]:
        """The batches of `raws`; on CUDA each is copied on a side stream while the one before is used."""
        if self._device.type != "cuda":
            yield from map(self._finish, raws)
            return
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for raw in raws:
            with torch.cuda.stream(side):
                batch = self._finish(raw)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record(side)
            if waiting is not None:
                yield _handed_over(*waiting)
            waiting = batch, ready
        if waiting is not None:
            yield _handed_over(*waiting)

    def _finish(self, raw: Raw) -> Batch:
        labels = raw.labels.to(self._device, non_blocking=True)
        if self._device.type == "cpu":
            images = self._on_cpu(raw.images)
        else:
            # CUDA's convolutions prefer the pixels as they come, channels last.
            pixels = raw.images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            images = pixels.float().sub_(self._mean).div_(self._std)
        if self._mix is not None:
            images, labels = self._mix(images, labels, raw.seed)
        return Batch(images, labels)

    def _on_cpu(self, pixels: Tensor) -> Tensor:
        """A few images at a time, that stay in the cache between the steps."""
        images = torch.empty(len(pixels), 3, *pixels.shape[1:3])
        for start in range(0, len(pixels), _FEW):
            few = pixels[start : start + _FEW].permute(0, 3, 1, 2).contiguous()
            images[start : start + _FEW].copy_(few).sub_(self._mean).div_(self._std)
        return images


def _handed_over(batch: Batch, ready: torch.cuda.Event) -> Batch:
    """Make the current stream wait for the copy, and keep the memory until that stream is done with it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(ready)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
