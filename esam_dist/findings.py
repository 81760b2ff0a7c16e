"""What `esam-dist evaluate` finds out about a checkpoint, as its JSON file holds it: written there, read by the report.

Classes are numbered as the network's outputs are, from 0, in the order of `classes`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from esam_dist.errors import UserError
from esam_dist.files import write_file

FILE = "evaluation.json"
PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassScore(_Part):
    """How one class fared; `accuracy` is None where the data has no sample of it."""

    name: str
    count: Count
    accuracy: Share | None


class Bin(_Part):
    """The samples whose confidence lies in (low, high]: their number, mean confidence and accuracy."""

    low: Share
    high: Share
    count: Count
    confidence: Share | None
    accuracy: Share | None


class Mistake(_Part):
    """A sample that was taken for another class."""

    sample: str
    """Shard and member."""
    true: Count
    predicted: Count
    confidence: Share
    """Of the predicted class."""
    loss: Real
    picture: str = ""
    """The pixels that the network saw, as a data URI; empty: not kept."""

    @field_validator("picture")
    @classmethod
    def _is_picture(cls, text: str) -> str:
        if text and not PICTURE.fullmatch(text):
            raise ValueError("no data URI of a JPEG or PNG")
        return text


class CorruptionScore(_Part):
    """Accuracy where all images are corrupted in one way."""

    name: str
    severity: Annotated[int, Field(ge=1, le=5)]
    accuracy: Share
    loss: Real


class Findings(_Part):
    """What the file holds."""

    format: Literal[1] = 1
    checkpoint: str
    averaged: bool
    data: str
    """Folder of the prepared dataset whose validation split was read."""
    num_samples: Count
    """Samples counted, each once."""
    left_out: Count
    """Samples that could not be read."""
    accuracy: Share
    top5_accuracy: Share
    loss: Real
    calibration_error: Share
    """Expected calibration error over `bins`."""
    bins: list[Bin]
    classes: list[ClassScore]
    confusion: list[tuple[Count, Count, Annotated[int, Field(ge=1)]]]
    """(true class, predicted class, samples) of every pair that occurs."""
    mistakes: list[Mistake]
    """Those of the highest loss, that first."""
    corruptions: list[CorruptionScore] = []


def by_accuracy(found: Findings) -> list[ClassScore]:
    """The classes that have samples, the worst first; of equals the one with more samples."""
    scored = [score for score in found.classes if score.accuracy is not None]
    return sorted(scored, key=lambda score: (score.accuracy or 0.0, -score.count))


def confused_pairs(found: Findings) -> list[tuple[int, int, int]]:
    """(true class, predicted class, samples) of those that were taken for another class, the most first."""
    wrong = [pair for pair in found.confusion if pair[0] != pair[1]]
    return sorted(wrong, key=lambda pair: (-pair[2], pair[:2]))


def write(path: Path, found: Findings) -> None:
    """Let `path` hold `found`, in one move. Raises OSError."""
    write_file(path, found.model_dump_json(indent=1) + "\n")


def read(path: Path) -> Findings:
    """What `path` holds. Raises UserError for what `esam-dist evaluate` did not write."""
    try:
        return Findings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run `esam-dist evaluate RUN` again") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(
            f"{path}: is not what `esam-dist evaluate` writes ({place}: {fault['msg']}); run it again"
        ) from None
