"""Groups side by side: the summary, equal time, and which differences are more than chance between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from esam_dist.report.runs import Group, Run, interval

COLUMNS = (
    "Runs",
    "Seeds",
    "Best accuracy",
    "Last accuracy",
    "Validation loss",
    "Images/s",
    "Training time",
    "Restarts",
    "Skipped updates",
)
ENOUGH = 3
"""Seeds from which on there are intervals."""


class Difference(NamedTuple):
    """Last accuracy of one group minus that of the reference, and half of its 95% interval."""

    name: str
    reference: str
    mean: float
    half: float
    """nan for fewer than three seeds."""
    is_paired: bool

    @property
    def is_outside(self) -> bool | None:
        """Whether 0 lies outside the interval; None where there is none."""
        return None if math.isnan(self.half) else abs(self.mean) > self.half


def columns(groups: list[Group]) -> list[str]:
    """The head of the summary; several groups have a column for what each had reached in the time of the shortest."""
    if len(groups) == 1:
        return [*COLUMNS]
    return [*COLUMNS[:4], f"After {duration(common_seconds(groups))}", *COLUMNS[4:]]


def rows(groups: list[Group]) -> list[list[str]]:
    """The summary, one row of words per group, in the order of `columns`."""
    lines = [_row(members) for members in groups]
    if len(groups) > 1:
        end = common_seconds(groups)
        for line, members in zip(lines, groups, strict=True):
            reached = [value for run in members.runs if (value := _reached(run, end)) is not None]
            line.insert(4, number(reached if len(reached) == len(members.runs) else [], 4))
    return lines


def common_seconds(groups: list[Group]) -> float:
    """The training time of the shortest group: of its slowest seed."""
    return min(max(run.seconds for run in members.runs) for members in groups)


def differences(groups: list[Group]) -> list[Difference]:
    """Every other group minus the reference: SGD if it is there, else the first."""
    reference = next((m for m in groups if m.runs[0].settings.get("method.name") == "sgd"), groups[0])
    base = _last(reference)
    found = []
    for members in groups:
        own = _last(members)
        if members is reference or not own or not base:
            continue
        is_paired = own.keys() == base.keys() and len(own) == len(members.runs) == len(reference.runs)
        if is_paired:
            mean, half = interval([own[seed] - base[seed] for seed in own])
        else:
            mean, half = _welch([*own.values()], [*base.values()])
        found.append(Difference(members.name, reference.name, mean, half, is_paired))
    return found


def difference_table(groups: list[Group]) -> list[list[str]]:
    """Differences as words: what, how much, and whether more than chance between seeds."""
    words = {None: f"{ENOUGH} seeds are needed", True: "yes", False: "no"}
    return [
        [f"{found.name} - {found.reference}", plus_minus(found.mean, found.half, "+.4f"), words[found.is_outside]]
        for found in differences(groups)
    ]


def duration(seconds: float) -> str:
    """A length of time, in a unit that suits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 30 else f"{seconds:.2g} s"


def number(values: Sequence[float], digits: int) -> str:
    """Mean of `values`: with its interval from three on, with the two values where there are only two."""
    mean, half = interval([*values])
    if len(values) == 2 and values[0] != values[1]:
        return f"{mean:.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"
    return plus_minus(mean, half, f".{digits}f")


def plus_minus(mean: float, half: float, form: str) -> str:
    """A mean and half the width of its interval, where there is one."""
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" \u00b1 {half:{form.lstrip('+')}}")


def _row(members: Group) -> list[str]:
    accuracies = [[accuracy for _, accuracy in run.accuracies] for run in members.runs if run.accuracies]
    losses = [run.validation[-1].get("loss") for run in members.runs if run.validation]
    speed = [row["images_per_second"] for run in members.runs for row in run.train if row.get("images_per_second")]
    return [
        members.name,
        ", ".join(run.seed for run in members.runs),
        number([max(values) for values in accuracies], 4),
        number([values[-1] for values in accuracies], 4),
        number([loss for loss in losses if isinstance(loss, int | float)], 4),
        f"{sorted(speed)[len(speed) // 2]:.0f}" if speed else "-",
        duration(sum(run.seconds for run in members.runs) / len(members.runs)),
        str(sum(len(run.restarts) for run in members.runs)),
        str(sum(row.get("skipped_updates", 0) for run in members.runs for row in run.train)),
    ]


def _reached(run: Run, seconds: float) -> float | None:
    """The accuracy of the last validation within `seconds` of training."""
    within = [accuracy for step, accuracy in run.accuracies if run.seconds_at(step) <= seconds]
    return within[-1] if within else None


def _last(members: Group) -> dict[str, float]:
    """The accuracy after the last update, by seed."""
    return {run.seed: run.accuracies[-1][1] for run in members.runs if run.accuracies}


def _welch(own: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Difference of the means of two independent samples, and half of its interval (Student's t by Welch)."""
    mean = interval([*own])[0] - interval([*base])[0]
    if min(len(own), len(base)) < ENOUGH:
        return mean, math.nan
    from scipy.stats import ttest_ind

    low, high = ttest_ind(own, base, equal_var=False).confidence_interval(0.95)
    return mean, float(high - low) / 2
