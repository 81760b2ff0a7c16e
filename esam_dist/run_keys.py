"""The keys of `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from esam_dist.section import Folder, Section


def _text(value: object) -> object:
    """A step's number is written without quotes."""
    return str(value) if type(value) is int else value


class RunKeys(Section):
    """Where the run lives, and what makes it repeatable."""

    folder: Folder = Path("runs/esam")
    """Everything the run writes: config, metrics, checkpoints, environment."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Weights, data order, augmentation, perturbed parameters and dropout are functions of it."""
    resume: Annotated[str, BeforeValidator(_text)] = "auto"
    """`auto`: continue from the newest valid checkpoint; `never`: a new run; else another run's folder, or one of its
    checkpoints (`RUN/step_N`, `RUN/N`, or its folder)."""
