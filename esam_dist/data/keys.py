"""The keys of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from esam_dist.section import Count, Faults, Folder, NonNegative, Positive, Real, Section


class DataKeys(Section):
    """What is read, and how it becomes batches."""

    path: Folder = Path("data/digits")
    """Folder with `train` and `validation` shards, as `esam-dist prepare` writes it."""
    batch_size: Count = 64
    """Images per rank and micro-batch."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 decodes in the training process."""
    image_size: Count = 32
    """Height and width of the images that the network sees, in pixels."""
    augment: Literal["none", "shift", "imagenet"] = "shift"
    """`shift`: random crop after a zero border of 1/8; `imagenet`: random resized crop and flip."""
    progressive: list[Annotated[list[Count | NonNegative], Field(min_length=2, max_length=2)]] = []
    """`[[epoch, size], ...]`: from each epoch on, train at that size instead of `image_size`."""
    flip: bool = False
    """Mirror half of the training images; `augment: imagenet` always does."""
    crop_area: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    """`augment: imagenet`: smallest and largest share of the image's area in a crop."""
    antialias: bool = True
    """Average all pixels where a training crop shrinks; false: four neighbours only, faster on large originals."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Colour and shape distortions after the crop: RandAugment (two of `magnitude`) or TrivialAugment."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of `policy: randaugment`."""
    color_jitter: NonNegative = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.0
    """Probability that a rectangle of a training image is replaced by the mean colour."""
    mixup: NonNegative = 0.0
    """Alpha of mixup: each batch is blended with itself, shifted by one; labels become soft. 0: off."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix, likewise; with both on, each batch draws one of the two."""
    repeats: Count = 1
    """Times that each sample appears in a row, augmented anew; an epoch then visits 1 / repeats of the samples."""
    crop_ratio: Annotated[Real, Field(gt=0.0, le=1.0)] = 1.0
    """Validation sees this share of the shorter side, centred: 0.875 is resize 256, crop 224."""
    mean: Annotated[list[Real], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    """Subtracted from red, green and blue, in units of the full range."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    """Red, green and blue are divided by it, in units of the full range."""
    shuffle_window: Count = 16
    """Samples are shuffled within this many shards, themselves in shuffled order."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """`uniform`: every sample once in an epoch; `balanced`: every class equally often, for classes of uneven sizes."""
    stream: str = ""
    """Training shards to draw from instead, for ever: `pipe:`, `http(s)://`, `s3://` with braces, `{000..146}`."""
    stream_samples: Annotated[int, Field(ge=0)] = 0
    """Samples of `stream` that count as one epoch."""
    stream_cache: Folder | None = None
    """Folder that keeps the shards of `stream` once they are fetched; empty: nothing is kept."""
    stream_tries: Count = 5
    """Attempts to fetch a shard of `stream`, with pauses of 0.5, 1, 2, ... seconds."""
    max_skipped: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.01
    """Largest share of the samples that may be unreadable. A rank that has met more than e + 4 sqrt(e) stops the run;
    e is this share of what it has read, but at least 1."""

    def faults(self) -> Faults:
        """Values that make no sense together."""
        given = self.progressive
        epochs, sizes = [epoch for epoch, _ in given], [size for _, size in given]
        return [
            (
                bool(self.stream) and self.sampling != "uniform",
                f"data.sampling = {self.sampling}: the classes of data.stream are not known before its shards come; "
                "copy the shards and read them by data.path, or leave data.sampling out",
            ),
            (
                any(size < 1 or size != int(size) for size in sizes),
                f"data.progressive = {given}: a size is a whole number of pixels; write [[epoch, size], ...]",
            ),
            (
                epochs != sorted(set(epochs)),
                f"data.progressive = {given}: each entry begins after the one before; sort them by epoch",
            ),
        ]
