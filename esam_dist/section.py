"""What every section of the configuration is made of: the base class, and the kinds of value that keys hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from esam_dist.schedule import Schedule
from esam_dist.wording import WORDS


def _shares(schedule: Schedule) -> Schedule:
    for value in schedule.values():
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{value:g} is out of range; give a share in (0, 1]")
    return schedule


def _radii(schedule: Schedule) -> Schedule:
    for value in schedule.values():
        if value < 0.0:
            raise ValueError(f"{value:g} is negative; give a radius >= 0")
    return schedule


Count = Annotated[int, Field(ge=1)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0.0)]
NonNegative = Annotated[Real, Field(ge=0.0)]
BelowOne = Annotated[Real, Field(ge=0.0, lt=1.0)]
UpToOne = Annotated[Real, Field(ge=0.0, le=1.0)]
Folder = Annotated[Path, Field(strict=False)]
_FORMS = "a number, [[epoch, value], ...], or {from: A, to: B, epochs: N}"
Share = Annotated[Schedule, AfterValidator(_shares), WithJsonSchema({WORDS: f"{_FORMS}; values above 0 and at most 1"})]
Radius = Annotated[Schedule, AfterValidator(_radii), WithJsonSchema({WORDS: f"{_FORMS}; values at least 0"})]


Faults = list[tuple[bool, str]]
"""Whether a combination of keys is refused, and the words."""


class Section(BaseModel):
    """One section of the file: unknown keys are refused, text is not taken for a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )
