"""Natural-looking photographs, made by a script: the statistics that a JPEG decoder's time depends on.

Every image sums colour noise with a 1/f amplitude spectrum (as photographs have), overlapping shaded shapes with hard
edges, and sensor noise, then is compressed at quality 90. Size: about that of ImageNet's files (110 kB at 500x375).
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


def photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """One image, a function of the seed."""
    random = np.random.default_rng(seed)
    background = _colour_noise(random, width, height, 1.25)
    texture = _colour_noise(random, width, height, 0.85)
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    for _ in range(int(random.integers(3, 12))):
        x, y = random.integers(0, width), random.integers(0, height)
        rx, ry = random.integers(10, width // 3), random.integers(10, height // 3)
        shape = canvas.ellipse if random.random() < 0.6 else canvas.rectangle
        shape((int(x - rx), int(y - ry), int(x + rx), int(y + ry)), fill=int(random.integers(0, 256)))
    share = np.asarray(mask, np.float32)[..., None] / 255
    pixels = background * (1 - share) + texture * share + random.normal(0, 4.0, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The image as a baseline JPEG with 4:2:0 chroma, as most photographs on the web are."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)
    return file.getvalue()


def _colour_noise(random: np.random.Generator, width: int, height: int, power: float) -> NDArray[np.float32]:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** power
    white = np.fft.rfft2(random.normal(size=(3, height, width)))
    noise = np.fft.irfft2(white * amplitude, s=(height, width))
    fields = [(field - field.mean()) / field.std() for field in noise]
    red, green, blue = fields[0] + 0.4 * fields[1], fields[0], fields[0] + 0.4 * fields[2]
    return (np.stack([red, green, blue], -1) * 45 + random.uniform(80, 170)).astype(np.float32)
