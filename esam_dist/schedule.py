"""Values that change during training, as plain functions of the epoch.

The epoch is a float: samples seen so far, divided by the samples in the training set. So a schedule means the same with
any number of ranks, and a run resumed with another number of ranks continues it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Schedule:
    """A value by epoch: linear between `knots`, constant before the first and after the last.

    Written in a config as a number, as `{from: 1.0, to: 0.5, epochs: 10}`, or as `[[0, 0.05], [30, 0.1]]`, a list of
    (epoch, value) in which each value holds until the next epoch named.
    """

    knots: tuple[tuple[float, float], ...]
    linear: bool = False

    @staticmethod
    def constant(value: float) -> Schedule:
        """One value for all epochs."""
        return Schedule(((0.0, float(value)),))

    def values(self) -> list[float]:
        """The values at the knots; the schedule never leaves their range."""
        return [value for _, value in self.knots]

    @property
    def changes(self) -> bool:
        """Whether it is more than one value."""
        return len(self.knots) > 1

    def __call__(self, epoch: float) -> float:
        """The value at `epoch`: samples seen, divided by the samples in the set."""
        for (start, first), (end, last) in pairwise(self.knots):
            if epoch < end:
                share = max(0.0, (epoch - start) / (end - start)) if self.linear else 0.0
                return first + share * (last - first)
        return self.knots[-1][1]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic read and write the three forms."""
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """Read a number, `{from, to, epochs}` or `[[epoch, value], ...]`. Raises ValueError for anything else."""
        if isinstance(value, Schedule):
            return value
        if _is_number(value):
            return cls.constant(value)
        if isinstance(value, dict) and set(value) == {"from", "to", "epochs"} and all(map(_is_number, value.values())):
            if value["epochs"] > 0:
                return cls(((0.0, float(value["from"])), (float(value["epochs"]), float(value["to"]))), linear=True)
        elif isinstance(value, list) and value and all(_is_pair(pair) for pair in value):
            knots = tuple((float(epoch), float(entry)) for epoch, entry in value)
            if all(first[0] < second[0] for first, second in pairwise(knots)):
                return cls(knots)
        raise ValueError("give a number, {from: A, to: B, epochs: N} with N > 0, or [[epoch, value], ...] in order")

    def plain(self) -> Any:
        """The value in the form that a config file holds."""
        if self.linear:
            return {"from": self.knots[0][1], "to": self.knots[1][1], "epochs": self.knots[1][0]}
        if len(self.knots) == 1:
            return self.knots[0][1]
        return [list(knot) for knot in self.knots]


@dataclass(frozen=True)
class LearningRate:
    """A rate by epoch: linear warm-up from 0 to `peak`, then cosine to 0 at the end, steps, or constant.

    In the warm-up an update takes the rate of its end: the first one would else be made at rate 0, and change nothing.
    """

    peak: float
    epochs: float
    """All of the training."""
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step_epochs: Sequence[float] = ()
    step_factor: float = 0.1
    update_epochs: float = 0.0
    """What an update is of an epoch."""

    def __call__(self, epoch: float) -> float:
        """The rate of the update that begins at `epoch`."""
        if epoch < self.warmup_epochs:
            return self.peak * min(1.0, (epoch + self.update_epochs) / self.warmup_epochs)
        if self.schedule == "constant":
            return self.peak
        if self.schedule == "step":
            return float(self.peak * self.step_factor ** sum(epoch >= milestone for milestone in self.step_epochs))
        share = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
