"""From an image file to the pixels of a crop, at the size that the network sees.

JPEGs go through libjpeg-turbo (simplejpeg) and OpenCV's resize, the fastest pair measured (docs/data.md); whatever
those do not know, or complain about, goes through Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch.nn import functional as F

from esam_dist.data.dataset import SampleError
from esam_dist.data.jpeg import Edges, cut, read_header

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: they are mistakes, or attacks on the memory."""

FREE_PIXELS = 1 << 24
"""Up to so many pixels an image may be as small a file as it will: a single colour takes few bytes."""

MAX_PIXELS_PER_BYTE = 512
"""Of larger images: a whole JPEG holds no more, since it has a bit at least for each 8 x 8 of them."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""Names of files that are taken for images."""

RESOURCE_FORK = "._"
"""How files begin that macOS puts beside others, under their names."""

Pixels = NDArray[np.uint8]

# One worker process per core: more threads only get in each other's way.
cv2.setNumThreads(0)

# Pillow knows formats that start other programs (Ghostscript), whatever the name of the file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


class Box(NamedTuple):
    """A crop in pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


class ImageFile:
    """An image whose size is known; a plain JPEG is decoded once the crop is known, all else at once.

    Raises SampleError, here or in `crop`, for what is no image, is cut short, or has too many pixels.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pixels: Pixels | None = None
        header = read_header(data)
        try:
            if header is None:
                raise ValueError
            self.height, self.width, *_ = simplejpeg.decode_jpeg_header(data)
            self._header = header
        except ValueError:
            self._pixels = upright(open_image(data))
            self.height, self.width = self._pixels.shape[:2]
        _check_size(self.width, self.height, len(data))

    def crop(self, box: Box, out: Pixels, *, antialias: bool = True) -> None:
        """Write the pixels of `box` into `out` [S, S, 3], RGB. Raises SampleError."""
        pixels = self._turbo(box, out.shape[0]) if self._pixels is None else None
        if pixels is None:
            if self._pixels is None:
                # CMYK, and files with harmless warnings; Pillow knows those from files that are cut short.
                self._pixels = upright(open_image(self._data))
            left, top, right, bottom = self._edges(box, *self._pixels.shape[:2])
            pixels = self._pixels[top:bottom, left:right]
        _resize(pixels, out, antialias)

    def _turbo(self, box: Box, size: int) -> Pixels | None:
        """The pixels of `box`, at 1/2, 1/4 or 1/8 where it shrinks by more than that; None: simplejpeg refuses them."""
        down = 1
        while down < 8 and min(box.width, box.height) >= 2 * down * size:
            down *= 2
        edges = self._edges(box, -(-self.height // down), -(-self.width // down))
        data, x, y = cut(self._data, self._header, edges.times(down))
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            pixels: Pixels = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=True, fastupsample=True, min_height=-(-height // down), min_width=-(-width // down)
            )
        except ValueError:
            return None
        # Cuts lie at multiples of 8 pixels, so they are whole pixels at any of these scales.
        x, y = x // down, y // down
        return pixels[edges.top - y : edges.bottom - y, edges.left - x : edges.right - x]

    def _edges(self, box: Box, rows: int, columns: int) -> Edges:
        """Those of `box` in a picture of so many rows and columns; at least one pixel."""
        y, x = rows / self.height, columns / self.width
        top, left = min(round(box.top * y), rows - 1), min(round(box.left * x), columns - 1)
        bottom, right = round((box.top + box.height) * y), round((box.left + box.width) * x)
        return Edges(left, top, max(right, left + 1), max(bottom, top + 1))


def check_image(data: bytes) -> None:
    """Raise SampleError unless all of an image can be decoded as training would decode it."""
    image = ImageFile(data)
    # All of it: of a crop, less could be decoded.
    image.crop(Box(0, 0, image.width, image.height), np.empty((8, 8, 3), np.uint8))


def open_image(data: bytes) -> Image.Image:
    """The header of an image file of a format named in SUFFIXES. Raises SampleError, also for too many pixels."""
    with _pillow():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(*image.size, len(data))
    return image


def upright(image: Image.Image) -> Pixels:
    """The first frame of `image` as its EXIF block would have it turned: [H, W, 3], RGB. Raises SampleError."""
    # 16 bits are known by another mode, but by Pillow before 11 where PNG and PPM have them.
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise SampleError("undecodable", f"{_DEPTHS[image.mode]}, whose range nobody knows; write 8 or 16 bits")
    with _pillow():
        bits, white_is_zero = _grey_of(image)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow would clip 16 bits to 8, and show white.
            grey = (np.asarray(image).astype(np.uint32) >> (bits - 8)).astype(np.uint8)
            image = Image.fromarray(255 - grey if white_is_zero else grey)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


_DEPTHS = {"F": "its pixels are floating-point numbers", "I": "its pixels are integers of 32 bits, or signed"}


def _grey_of(image: Image.Image) -> tuple[int, bool]:
    """The bits of a grey value that has more than 8, and whether 0 is white: what a TIFF may say, and Pillow leaves."""
    if not (isinstance(image, TiffImageFile) and image.mode.startswith("I")):
        return 16, False
    return int(image.tag_v2[258][0]), image.tag_v2.get(262) == 0


@contextmanager
def _pillow() -> Iterator[None]:
    """Pillow at work: a damaged file makes its parsers raise nearly anything, and one file must not end a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", str(error)) from None
    except Exception as error:
        # Pillow's words end with where the bytes lie in memory.
        told = str(error).partition(" <_io.BytesIO")[0]
        raise SampleError("undecodable", told or type(error).__name__) from None


def _check_size(width: int, height: int, num_bytes: int) -> None:
    most = min(MAX_PIXELS, max(FREE_PIXELS, MAX_PIXELS_PER_BYTE * num_bytes))
    if not 0 < width * height <= most:
        raise SampleError(
            "too_large" if width * height else "undecodable", f"{width} x {height} pixels in {num_bytes} bytes"
        )


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
