"""What the results say: means with intervals, paired differences, Holm's correction, time to target, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from esam_dist.compare.runs import Result
from esam_dist.compare.study import Study
from esam_dist.report.runs import interval


@dataclass(frozen=True)
class Cell:
    """One method at one budget, over its seeds that did not diverge."""

    method: str
    budget: float
    results: list[Result]
    mean: float
    half: float
    """Half width of the mean's 95% interval; nan for fewer than three seeds."""
    diverged: int

    @property
    def seconds(self) -> float:
        """Of a run, as calibrated."""
        return self.results[0].run.seconds if self.results else math.nan


@dataclass(frozen=True)
class Difference:
    """Of two methods at one budget: first minus second, over the seeds that both have."""

    methods: tuple[str, str]
    budget: float
    num_seeds: int
    mean: float
    half: float
    p: float
    """Of the paired t-test; nan for fewer than two seeds, or differences that are all the same."""
    p_holm: float


@dataclass(frozen=True)
class Reached:
    """When a method reached an accuracy."""

    method: str
    target: float
    num_reached: int
    num_seeds: int
    seconds: float
    """The median over seeds; infinite where half of them or more never did."""


def cells(study: Study, results: Sequence[Result]) -> list[Cell]:
    """Every method at every budget, by budget."""
    found = []
    for budget in sorted(study.budgets):
        for method in study.methods:
            own = [r for r in results if (r.run.variant.method, r.run.budget) == (method, budget)]
            sound = [r for r in own if not r.diverged]
            mean, half = interval([r.accuracy(study.accuracy) for r in sound])
            found.append(Cell(method, budget, sound, mean, half, len(own) - len(sound)))
    return found


def front(found: Sequence[Cell]) -> list[Cell]:
    """The cells than which none is as cheap and better: the best of a budget, where it beats all smaller budgets."""
    best: list[Cell] = []
    for budget in sorted({cell.budget for cell in found}):
        own = [cell for cell in found if cell.budget == budget and not math.isnan(cell.mean)]
        top = max(own, key=lambda cell: cell.mean, default=None)
        if top is not None and (not best or top.mean > best[-1].mean):
            best.append(top)
    return best


def differences(study: Study, found: Sequence[Cell]) -> list[Difference]:
    """Every declared comparison at every budget; Holm's correction is over all of them."""
    accuracy = {
        (cell.method, cell.budget): {r.run.seed: r.accuracy(study.accuracy) for r in cell.results} for cell in found
    }
    pairs = [(first, second, budget) for first, second in study.comparisons for budget in sorted(study.budgets)]
    samples = []
    for first, second, budget in pairs:
        of_first, of_second = accuracy[first, budget], accuracy[second, budget]
        seeds = [seed for seed in study.seeds if seed in of_first and seed in of_second]
        samples.append(([of_first[seed] for seed in seeds], [of_second[seed] for seed in seeds]))
    p = [paired_p(one, other) for one, other in samples]
    rows = []
    for (first, second, budget), (one, other), plain, corrected in zip(pairs, samples, p, holm(p), strict=True):
        mean, half = interval([a - b for a, b in zip(one, other, strict=True)])
        rows.append(Difference((first, second), budget, len(one), mean, half, plain, corrected))
    return rows


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """The two-sided p-value of the paired t-test; nan where it says nothing."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    if len(gaps) < 2 or max(gaps) - min(gaps) < 1e-12:
        return math.nan
    from scipy.stats import ttest_rel

    return float(ttest_rel(one, other).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979); one that is nan stays so, and counts as 1."""
    known = [1.0 if math.isnan(value) else value for value in p]
    corrected, largest = [math.nan] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * known[place]))
        corrected[place] = math.nan if math.isnan(p[place]) else largest
    return corrected


def times_to_target(study: Study, results: Sequence[Result]) -> list[Reached]:
    """For each target and method the time of the first validation that reached it, in any of a seed's runs."""
    found = []
    for target in study.targets:
        for method in study.methods:
            own = [r for r in results if r.run.variant.method == method]
            first = {r.run.seed: math.inf for r in own}
            for r in own:
                times = [seconds for seconds, accuracy in r.curve if accuracy >= target]
                first[r.run.seed] = min([first[r.run.seed], *times])
            reached = sum(map(math.isfinite, first.values()))
            found.append(Reached(method, target, reached, len(first), median(first.values()) if first else math.inf))
    return found


def choose(study: Study, results: Sequence[Result]) -> dict[str, int]:
    """For each method the number of its best trial: the highest mean, a run that diverged counting as 0."""
    scores: dict[str, dict[int, list[float]]] = {}
    for r in results:
        value = 0.0 if r.diverged else r.accuracy(study.accuracy)
        scores.setdefault(r.run.variant.method, {}).setdefault(r.run.variant.number, []).append(value)
    return {
        method: max(own, key=lambda number: (fmean(own[number]), -number))  # used at once
        for method, own in scores.items()
    }
