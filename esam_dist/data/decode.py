"""From an image file to the pixels of a crop, at the size that the network sees.

JPEGs go through libjpeg-turbo (simplejpeg) and OpenCV's resize, the fastest pair measured (docs/data.md); whatever
those do not know, or complain about, goes through Pillow.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn import functional as F

from esam_dist.data.dataset import SampleError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: they are mistakes, or attacks on the memory."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""Names of files that are taken for images."""

Pixels = NDArray[np.uint8]

# One worker process per core: more threads only get in each other's way.
cv2.setNumThreads(0)

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, OverflowError, MemoryError, Image.DecompressionBombError)


class Box(NamedTuple):
    """A crop in pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


class ImageFile:
    """An image whose header has been read; pixels are decoded once the crop is known.

    Raises SampleError, here or in `crop`, for what is no image, is cut short, or has more than MAX_PIXELS.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._image: Image.Image | None = None
        try:
            if not _is_plain_jpeg(data):
                raise ValueError
            self.height, self.width, self._colour, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            self._image = open_image(data)
            self.width, self.height = _upright_size(self._image)
        if self.width * self.height > MAX_PIXELS:
            raise SampleError("too_large", f"{self.width} x {self.height} pixels")

    def crop(self, box: Box, out: Pixels, *, antialias: bool = True) -> None:
        """Write the pixels of `box` into `out` [S, S, 3], RGB. Raises SampleError."""
        pixels = self._turbo(box, out.shape[0]) if self._image is None else upright(self._image)
        down = self.height / pixels.shape[0]
        top, left = round(box.top / down), round(box.left / down)
        bottom, right = round((box.top + box.height) / down), round((box.left + box.width) / down)
        _resize(pixels[top : max(bottom, top + 1), left : max(right, left + 1)], out, antialias)

    def _turbo(self, box: Box, size: int) -> Pixels:
        """All pixels, at 1/2, 1/4 or 1/8 in both directions where the crop shrinks by more than that."""
        down = 1
        while down < 8 and min(box.width, box.height) >= 2 * down * size:
            down *= 2
        wanted = {"min_height": -(-self.height // down), "min_width": -(-self.width // down)} if down > 1 else {}
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self._data, "RGB", fastdct=True, fastupsample=True, **wanted)
        except ValueError:
            # CMYK, and files with harmless warnings; Pillow knows those from files that are cut short.
            self._image = open_image(self._data)
            return upright(self._image)
        return pixels


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether `data` is a JPEG without an Exif block, which may say that the picture is rotated."""
    return data.startswith(_JPEG) and data.find(_EXIF, 0, 1024) < 0


def open_image(data: bytes) -> Image.Image:
    """The header of an image file of any format that Pillow knows. Raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except _PILLOW_ERRORS as error:
        raise SampleError("undecodable", str(error)) from None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    try:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except _PILLOW_ERRORS as error:
        raise SampleError("undecodable", str(error)) from None
    return (height, width) if turned else (width, height)


def upright(image: Image.Image) -> Pixels:
    """The first frame of `image` as its EXIF block would have it turned: [H, W, 3], RGB. Raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # Pillow would clip 16 bits to 8, and show white.
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except _PILLOW_ERRORS as error:
        raise SampleError("undecodable", str(error)) from None


def _resize(pixels: Pixels, out: Pixels, antialias: bool) -> None:
    size = out.shape[0]
    if antialias and max(pixels.shape[:2]) > size:
        # The batch's dimension comes first of all, so that torch sees channels last: it would else write planes, and to
        # interleave them costs more than the resize.
        planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        small = F.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[:] = small[0].permute(1, 2, 0).numpy()
    else:
        cv2.resize(pixels, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
