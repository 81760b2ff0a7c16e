"""Image files on their way into shards: kept to the byte, or made smaller once instead of in every epoch."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import MAX_PIXELS, open_image, upright


@dataclass(frozen=True)
class Encoding:
    """How images are stored: `short_side` in pixels (0: bytes are kept), and the JPEG quality of smaller copies."""

    short_side: int = 0
    quality: int = 90

    def __call__(self, data: bytes, suffix: str) -> tuple[bytes, str]:
        """The file to store for `data`. Raises SampleError when it must be decoded and cannot.

        An image that is small enough is kept as it is, unless it is turned by EXIF or has colours that are not RGB.
        """
        if self.short_side == 0:
            return data, suffix
        image = open_image(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise SampleError("too_large", f"{width} x {height} pixels")
        # Also what is kept is decoded: nothing less tells that it can be.
        full = Image.fromarray(upright(image))
        scale = self.short_side / min(width, height)
        if scale >= 1 and image.mode in ("RGB", "L") and not image.getexif():
            return data, suffix
        if scale < 1:
            full = full.resize((round(full.width * scale), round(full.height * scale)), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        full.save(file, "JPEG", quality=self.quality, subsampling="4:2:0", optimize=True, restart_marker_blocks=1)
        return file.getvalue(), "jpg"


def png(pixels: Image.Image) -> tuple[bytes, str]:
    """A PNG file of an image that has no file of its own."""
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue(), "png"
