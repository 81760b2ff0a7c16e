"""Image files on their way into shards: kept to the byte, or made smaller once instead of in every epoch."""

from __future__ import annotations

import io
import subprocess
from dataclasses import dataclass

from PIL import Image

from esam_dist.data.decode import check_image, open_image, upright
from esam_dist.data.jpeg import read_header

JPEGTRAN = "jpegtran"
"""libjpeg's program that rewrites JPEGs without decoding them to pixels."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored: kept to the byte, or as smaller copies, which have restart markers (data/jpeg.py)."""

    short_side: int = 0
    """In pixels, of smaller copies; 0: none are made."""
    quality: int = 90
    """JPEG quality of smaller copies."""
    restart_markers: bool = False
    """Whether JPEGs that are not made smaller get restart markers, by jpegtran: all bytes change, but no pixel."""

    def __call__(self, data: bytes, suffix: str) -> tuple[bytes, str]:
        """The file to store for `data`. Raises SampleError when it cannot be decoded.

        An image that is small enough is kept as it is, unless it is turned by EXIF or has colours that are not RGB.
        """
        if self.short_side == 0:
            check_image(data)
            return self._kept(data), suffix
        image = open_image(data)
        # Also what is kept is decoded: nothing less tells that it can be.
        full = Image.fromarray(upright(image))
        scale = self.short_side / min(image.size)
        if scale >= 1 and image.mode in ("RGB", "L") and not image.getexif():
            return self._kept(data), suffix
        if scale < 1:
            full = full.resize((round(full.width * scale), round(full.height * scale)), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        full.save(file, "JPEG", quality=self.quality, subsampling="4:2:0", restart_marker_blocks=1)
        return file.getvalue(), "jpg"

    def _kept(self, data: bytes) -> bytes:
        return _with_restart_markers(data) if self.restart_markers else data


def _with_restart_markers(data: bytes) -> bytes:
    """The coefficients of a JPEG written anew, in one scan, with a marker behind every MCU; `data` where that fails."""
    header = read_header(data)
    if header is None or header.restart == 1:
        return data
    command = [JPEGTRAN, "-copy", "all", "-optimize", "-restart", "1B"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    # It also ends with another status when it had to guess: those files stay what they are, to be judged as such.
    return done.stdout if done.returncode == 0 else data


def png(pixels: Image.Image) -> tuple[bytes, str]:
    """A PNG file of an image that has no file of its own."""
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue(), "png"
