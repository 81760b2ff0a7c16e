"""Augmentation of one training image, as a pure function of the sample's seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from esam_dist.data.decode import Box, ImageFile, Pixels
from esam_dist.data.keys import DataKeys


class Augment:
    """Crop, mirror, distort and erase as the configuration says."""

    def __init__(self, cfg: DataKeys) -> None:
        self._cfg = cfg
        self._distort = _distortions(cfg)

    def __call__(self, image: ImageFile, seed: int, out: Pixels) -> None:
        """Write an augmented view of `image` into `out` [S, S, 3]. Raises SampleError."""
        random, cfg = Random(seed), self._cfg
        mirrored = random.random() < 0.5
        if cfg.augment == "imagenet":
            low, high = cfg.crop_area
            box = random_box(image.width, image.height, random, (low, high))
            image.crop(box, out, antialias=cfg.antialias)
        else:
            image.crop(centre_box(image.width, image.height), out, antialias=cfg.antialias)
            if cfg.augment == "shift":
                shift(out, random)
        if mirrored and (cfg.flip or cfg.augment == "imagenet"):
            cv2.flip(out, 1, dst=out)
        if self._distort:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                planes = torch.from_numpy(out).permute(2, 0, 1)
                for distort in self._distort:
                    planes = distort(planes)
                out[:] = planes.permute(1, 2, 0).numpy()


def centre_box(width: int, height: int, ratio: float = 1.0) -> Box:
    """The centre of an image: its largest square, times `ratio`."""
    side = max(1, round(min(width, height) * ratio))
    return Box((width - side) // 2, (height - side) // 2, side, side)


def random_box(width: int, height: int, random: Random, area: tuple[float, float] = (0.08, 1.0)) -> Box:
    """Inception's random resized crop: a share of the area in `area`, sides in a ratio between 3:4 and 4:3.

    Falls back to the largest centred box with such a ratio after ten tries, as torchvision does.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        pixels = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(random.randrange(width - w + 1), random.randrange(height - h + 1), w, h)
    w, h = max(1, min(width, round(height * high))), max(1, min(height, round(width / low)))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def shift(pixels: Pixels, random: Random) -> None:
    """Move `pixels` in place by up to 1/8 of their size in each direction, black moving in: pad and random crop."""
    border, size = pixels.shape[0] // 8, pixels.shape[0]
    padded = np.zeros((size + 2 * border, size + 2 * border, 3), np.uint8)
    padded[border : border + size, border : border + size] = pixels
    top, left = random.randrange(2 * border + 1), random.randrange(2 * border + 1)
    pixels[:] = padded[top : top + size, left : left + size]


def mixing(cfg: DataKeys, num_classes: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None:
    """What blends a batch's images [B, 3, S, S] and labels [B] into soft labels [B, K], given a seed; None: nothing."""
    choices: list[Callable[..., tuple[Tensor, Tensor]]] = []
    if cfg.mixup:
        choices.append(v2.MixUp(alpha=cfg.mixup, num_classes=num_classes))
    if cfg.cutmix:
        choices.append(v2.CutMix(alpha=cfg.cutmix, num_classes=num_classes))
    if not choices:
        return None

    def mix(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return choices[int(torch.randint(len(choices), ()))](images, labels)

    return mix


def _distortions(cfg: DataKeys) -> list[Callable[[Tensor], Tensor]]:
    """Transforms of uint8 images [3, S, S] that draw from torch's generator."""
    found: list[Callable[[Tensor], Tensor]] = []
    if cfg.policy == "randaugment":
        found.append(v2.RandAugment(num_ops=2, magnitude=cfg.magnitude))
    if cfg.policy == "trivialaugment":
        found.append(v2.TrivialAugmentWide())
    if cfg.color_jitter:
        found.append(v2.ColorJitter(cfg.color_jitter, cfg.color_jitter, cfg.color_jitter))
    if cfg.erase:
        found.append(v2.RandomErasing(cfg.erase, value=[round(255 * mean) for mean in cfg.mean]))
    return found
