"""The keys of `checkpoint`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esam_dist.section import Count, NonNegative, Section


class CheckpointKeys(Section):
    """What survives a failure."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Updates between two checkpoints; 0: only at the end of each epoch."""
    every_minutes: NonNegative = 0.0
    """Besides, a checkpoint when the last one was begun so many minutes ago; 0: none."""
    keep: Count = 2
    """Newest checkpoints kept; the best by validation accuracy is kept besides."""
    asynchronous: bool = True
    """Written while training goes on, from a copy in rank 0's host memory; `false`: all ranks wait for the disk."""
