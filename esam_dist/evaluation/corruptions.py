"""Common corruptions of images (ImageNet-C: Hendrycks and Dietterich 2019, arXiv 1903.12261), by `imagecorruptions`.

Applied to the pixels that the network would see, as ImageNet-C does at 224 pixels. Noise, contrast and JPEG are as
strong at any size; blurs and weather are measured in pixels, so they weigh more on a small image.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esam_dist.data.decode import Pixels
from esam_dist.errors import UserError, printable

INSTALL = "pip install numba scikit-image && pip install --no-deps imagecorruptions-imaug"
"""Its own dependencies include opencv-python, which overwrites the headless one and needs a display's libraries."""
SMALLEST = 32
DRAWS_BY_ITSELF = ("impulse_noise", "glass_blur")
"""Corruptions that take a seed, and do not draw from numpy's generator."""


@dataclass(frozen=True)
class Corruption:
    """Corrupts an image in place, always alike for the same seed; a `Change` of the data's view."""

    name: str
    severity: int

    def __call__(self, pixels: Pixels, seed: int) -> None:
        """See the class; `pixels` [S, S, 3]."""
        # The library draws from numpy's one generator, which others use too.
        state = np.random.get_state()
        try:
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32, zlib.crc32(self.name.encode()), self.severity])
            own = {"seed": int(np.random.randint(2**31 - 1))} if self.name in DRAWS_BY_ITSELF else {}
            pixels[:] = _library().corrupt(pixels, corruption_name=self.name, severity=self.severity, **own)
        finally:
            np.random.set_state(state)


def chosen(names: str, severities: str, image_size: int) -> list[Corruption]:
    """The corruptions of `names` (`all`: the 15 of ImageNet-C; or some, with commas) at `severities` (`1,3,5`).

    Raises UserError for what is not known, and where the library is missing or takes no image of that size.
    """
    library = _library()
    known: list[str] = library.get_corruption_names("all")
    wanted = library.get_corruption_names("common") if names == "all" else _words(names)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise UserError(
            f"--corruptions {printable(names)}: {', '.join(map(printable, unknown)) or 'nothing'} is no corruption; "
            f"give all, or some of {', '.join(known)}, with commas"
        )
    levels = _words(severities)
    if not levels or not set(levels) <= set("12345"):
        raise UserError(f"--severities {printable(severities)}: give some of 1,2,3,4,5, with commas")
    if image_size < SMALLEST:
        raise UserError(
            f"data.image_size = {image_size}: --corruptions takes images of {SMALLEST} pixels or more; train at such a "
            "size"
        )
    return [Corruption(name, severity) for name in wanted for severity in sorted(map(int, levels))]


def _words(text: str) -> Sequence[str]:
    return list(dict.fromkeys(word for word in text.split(",") if word))


def _library() -> Any:
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(f"--corruptions: a package is missing ({error}); {INSTALL}") from None
    return imagecorruptions
