"""Which part of an image the network sees: crops as a function of the image's size and the sample's seed."""

from __future__ import annotations

import math
from random import Random

import numpy as np

from esam_dist.data.decode import Box, ImageFile, Pixels


def centre_crop(image: ImageFile, size: int, ratio: float = 1.0) -> Pixels:
    """The centre of `image`: its largest square times `ratio`, as [size, size, 3]."""
    side = min(image.width, image.height) * ratio
    return image.crop(Box((image.width - side) / 2, (image.height - side) / 2, side, side), size)


def shifted(pixels: Pixels, random: Random) -> Pixels:
    """`pixels` moved by up to 1/8 of their size in each direction, zeros moving in: pad and random crop."""
    border = pixels.shape[0] // 8
    padded = np.pad(pixels, ((border, border), (border, border), (0, 0)))
    top, left = random.randrange(2 * border + 1), random.randrange(2 * border + 1)
    return padded[top : top + pixels.shape[0], left : left + pixels.shape[1]]


def random_box(width: int, height: int, random: Random, scale: tuple[float, float] = (0.08, 1.0)) -> Box:
    """Inception's random resized crop: an area in `scale` of the image, sides in the ratio 3:4 to 4:3.

    Falls back to the largest centred box with such a ratio after ten tries, as torchvision does.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(random.randrange(width - w + 1), random.randrange(height - h + 1), w, h)
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return Box((width - w) // 2, (height - h) // 2, w, h)
