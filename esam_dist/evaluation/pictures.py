"""Thumbnails of samples, as text that a page can hold."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from esam_dist.data.dataset import SampleError, Split
from esam_dist.data.decode import Pixels
from esam_dist.data.keys import DataKeys
from esam_dist.data.samples import View

SIDE = 96
"""Pixels of a thumbnail; what is smaller stays as it is."""
QUALITY = 80


def picture(split: Split, sample: int, cfg: DataKeys) -> str:
    """The pixels of a sample that the network sees, shrunk, as a data URI; empty where it cannot be read any more."""
    pixels: Pixels = np.empty((cfg.image_size, cfg.image_size, 3), np.uint8)
    try:
        View(cfg, train=False)(split.read(sample), 0, pixels)
    except SampleError:
        return ""
    if cfg.image_size <= SIDE:
        kind, options = "png", []
    else:
        kind, options = "jpeg", [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        pixels = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.uint8)
    done, data = cv2.imencode(f".{kind}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}" if done else ""
