"""The cutter of JPEG files, and the decoder that calls it: the first four bytes say which part is wanted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from esam_dist.data.dataset import SampleError
from esam_dist.data.decode import Box, ImageFile
from esam_dist.data.jpeg import Edges, cut, read_header


class JpegTarget:
    """See the module. The cutter raises nothing, and what it cuts is no longer than the file."""

    allowed = (SampleError,)
    modules = ("data/jpeg.py", "data/decode.py")
    memory_bytes = 1 << 30

    def __init__(self, _: Path) -> None:
        self._out = np.empty((16, 16, 3), np.uint8)

    def seeds(self) -> list[bytes]:
        """With and without restart markers, progressive, grey, CMYK, turned; and other formats."""
        colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
        picture = Image.fromarray(colours).resize((64, 48))
        exif = Image.Exif()
        exif[0x0112] = 6
        forms = [
            _saved(picture, "JPEG", quality=60, restart_marker_blocks=1),
            _saved(picture, "JPEG", quality=60, restart_marker_rows=1, subsampling=0),
            _saved(picture, "JPEG", quality=60, progressive=True, restart_marker_blocks=1),
            _saved(picture.convert("L"), "JPEG", restart_marker_blocks=2),
            _saved(picture.convert("CMYK"), "JPEG", restart_marker_blocks=1),
            _saved(picture, "JPEG", exif=exif),
            *(_saved(picture, kind) for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")),
        ]
        return [bytes([3, 5, 20, 16]) + form for form in forms]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        left, top, width, height = (data[:4] + bytes(4))[:4]
        file = data[4:]
        header = read_header(file)
        if header is not None:
            part = cut(file, header, Edges(left, top, left + width + 1, top + height + 1))
            assert len(part.data) <= len(file)
            assert 0 <= part.left <= left
            assert 0 <= part.top <= top
        image = ImageFile(file)
        image.crop(Box(0, 0, image.width, image.height), self._out)
        # As augmentation draws them: within the image.
        left, top = min(left, image.width - 1), min(top, image.height - 1)
        box = Box(left, top, min(width + 1, image.width - left), min(height + 1, image.height - top))
        image.crop(box, self._out, antialias=False)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
