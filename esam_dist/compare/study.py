"""A study: methods, budgets and seeds on one data set and network, and what is declared before any result is seen."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from esam_dist import wording
from esam_dist.config import strict_yaml
from esam_dist.errors import UserError, printable
from esam_dist.section import Count, Folder, Positive, Real, Section

OURS = ("run.folder", "run.seed", "run.resume", "train.epochs", "train.max_steps")
"""Keys that the study sets for every run."""
SHARED = ("data.path", "model.name")
"""Keys that are the same for all methods: they may be set in `overrides` only."""


def _keys(values: dict[str, Any]) -> dict[str, Any]:
    for key in values:
        if not re.fullmatch(r"\w+\.\w+", key):
            raise ValueError(f"{printable(key)!r} is no key; give section.key: value, such as optim.lr: 0.1")
        if key in OURS:
            raise ValueError(f"{key} is set by the study, for each run; remove it")
    return values


def _own(values: dict[str, Any]) -> dict[str, Any]:
    for key in values.keys() & set(SHARED):
        raise ValueError(f"{key} is the same for all methods; set it in the study's overrides")
    return _keys(values)


def _distinct(values: list[Any]) -> list[Any]:
    if len({str(value) for value in values}) < len(values):
        raise ValueError("a value is there twice; remove one")
    return values


Overrides = Annotated[dict[str, Any], AfterValidator(_keys)]
Own = Annotated[dict[str, Any], AfterValidator(_own)]
Choices = Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), AfterValidator(_distinct)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,59}$")]
InsideOne = Annotated[Real, Field(gt=0.0, lt=1.0)]


class Method(Section):
    """One method: what it changes in the base configuration, and what is tuned for it."""

    overrides: Own = {}
    """`section.key: value`"""
    grid: Annotated[dict[str, Choices], AfterValidator(_own)] = {}
    """`section.key: [values]`; every combination is one trial."""


class Tuning(Section):
    """How the values of grids are chosen."""

    budget: Positive | None = None
    """Of a trial; empty: the smallest of the study."""
    share: InsideOne = 0.2
    """Of the training images, held out to score trials."""
    seeds: Seeds = [1000]
    """Of the trials of each value."""


class Study(Section):
    """The study file."""

    base: Folder
    """Configuration that all runs share."""
    folder: Folder
    """Everything the study writes."""
    overrides: Overrides = {}
    """Changes to `base` for all runs, as `section.key: value`."""
    methods: Annotated[dict[Name, Method], Field(min_length=2)]
    """Name to `{overrides, grid}`. The cost of the first is the unit of the budgets."""
    budgets: Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
    """Epochs of the first method, each a budget."""
    seeds: Seeds
    """Each method runs with each of them at each budget."""
    equal: Literal["time", "flops", "epochs"] = "time"
    """What a budget is: the time that the first method takes for its epochs, its FLOPs, or the epochs themselves."""
    accuracy: Literal["raw", "averaged"] = "raw"
    """Which one is tuned and compared; `averaged`: of the averaged weights (`train.average`)."""
    comparisons: list[Annotated[list[str], Field(min_length=2, max_length=2), AfterValidator(_distinct)]] = []
    """Pairs of methods that are tested, declared before the runs."""
    targets: Annotated[list[InsideOne], AfterValidator(_distinct)] = []
    """Accuracies whose time is reported."""
    tuning: Tuning = Tuning()
    repeats: Count = 5
    """Timings of each update in the calibration, of which the median counts."""
    ranks: Count = 1
    """Ranks of each run; more than one under torchrun."""
    jobs: Count = 1
    """Runs at a time."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        for name in [name for pair in self.comparisons for name in pair]:
            if name not in self.methods:
                raise ValueError(f"comparisons: {printable(name)!r} is no method; give {', '.join(self.methods)}")
        trials = {name: num_trials(method) for name, method in self.methods.items()}
        if len(set(trials.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in trials.items())
            raise ValueError(
                f"methods: their grids have different numbers of trials ({told}); give every method equally many, one "
                "without keys of its own values of optim.lr or optim.weight_decay"
            )
        return self

    @property
    def is_tuned(self) -> bool:
        """Whether methods have grids."""
        return any(method.grid for method in self.methods.values())


def num_trials(method: Method) -> int:
    """Combinations of the values in the grid."""
    count = 1
    for values in method.grid.values():
        count *= len(values)
    return count


def load(path: Path) -> Study:
    """Read a study file (YAML). Raises UserError: one line that names the key, the value and the remedy."""
    source = f"study {printable(str(path))}"
    values = strict_yaml.read(path, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: must hold keys such as 'methods:'; see docs/compare.md")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_fault(error)}") from None


def dump(study: Study) -> str:
    """The study with all its defaults, as YAML that `load` reads back."""
    return strict_yaml.dump(study.model_dump(mode="json"))


def advice(study: Study) -> Iterable[str]:
    """What weakens the study, though it can be carried out."""
    budgets = sorted(study.budgets)
    if len(budgets) < 3 or any(high < 2 * low for low, high in itertools.pairwise(budgets)):
        yield f"budgets = {study.budgets}: at least three, each about 3 times the last, show how methods scale"
    if len(study.seeds) < 3:
        yield f"seeds = {study.seeds}: intervals need at least three, better five"
    if not study.comparisons:
        yield "comparisons: none is declared, so no difference is tested"


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    words = wording.refused(fault, wording.field_at(Study, [part for part in fault["loc"] if part != "[key]"]))
    if fault["type"] == "missing":
        return f"{place} is missing; it is required (see docs/compare.md)"
    if fault["type"] == "extra_forbidden":
        kinds: dict[int, type[Section]] = {1: Study, 2: Tuning, 3: Method}
        known = list(kinds[len(fault["loc"])].model_fields)
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.4)
        return f"unknown key {printable(place)!r}; {'did you mean' if near else 'give'} {', '.join(near or known)}"
    if not place:
        return words
    given = printable(str(fault["input"]))
    return f"{printable(place)} = {given if len(given) <= 60 else given[:57] + '...'} is refused: {words}"
