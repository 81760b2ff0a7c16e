"""The keys of `checkpoint`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esam_dist.section import Count, Section


class CheckpointKeys(Section):
    """What survives a failure."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Updates between two checkpoints; 0: only at the end of each epoch."""
    keep: Count = 2
    """Newest checkpoints kept; the best by validation accuracy is kept besides."""
