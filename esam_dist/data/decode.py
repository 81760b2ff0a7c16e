"""From an image file to the pixels of a crop, at the size that the network sees."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esam_dist.data.dataset import SampleError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: they are mistakes, or attacks on the memory."""

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A crop in pixels of the original image."""

    left: float
    top: float
    width: float
    height: float


class ImageFile:
    """An image whose header has been read; pixels are decoded once the crop is known."""

    def __init__(self, data: bytes) -> None:
        try:
            self._image = Image.open(io.BytesIO(data))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SampleError("undecodable", str(error)) from None
        self.width, self.height = self._image.size
        if self.width * self.height > MAX_PIXELS:
            raise SampleError("too_large", f"{self.width} x {self.height} pixels")

    def crop(self, box: Box, size: int) -> Pixels:
        """The pixels of `box`, resized to [size, size, 3] RGB. Raises SampleError."""
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        try:
            image = self._image.convert("RGB")
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=edges))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SampleError("undecodable", str(error)) from None
