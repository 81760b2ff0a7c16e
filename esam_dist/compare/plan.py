"""The runs of a study: which configuration each has, how long it trains, and where it lives."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from esam_dist import config
from esam_dist.compare.study import Study
from esam_dist.errors import UserError
from esam_dist.progress import Progress
from esam_dist.schedule import Schedule
from esam_dist.train import final_step

BASE = "base.yaml"
NOT_LEARNED = ("run", "metrics", "checkpoint")
"""Sections that say where a run writes, not what it learns."""


@dataclass(frozen=True)
class Cost:
    """What one update takes, over all ranks."""

    seconds: float
    flops: float
    images: int

    def of_an_image(self, equal: str) -> float:
        """The cost of an image, in what is to be equal."""
        return {"time": self.seconds, "flops": self.flops, "epochs": float(self.images)}[equal] / self.images


@dataclass(frozen=True)
class Variant:
    """A method with one choice of the values of its grid."""

    method: str
    number: int
    values: dict[str, Any]
    overrides: dict[str, Any]
    """All that it changes in the base configuration."""

    @property
    def name(self) -> str:
        """The method and what is chosen for it."""
        chosen = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in self.values.items())
        return f"{self.method} ({chosen})" if chosen else self.method


@dataclass(frozen=True)
class Planned:
    """One run."""

    variant: Variant
    budget: float
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    """`section.key=value` for the base file."""
    config_hash: str
    epochs: float
    updates: int
    budget_used: float
    """Share of the budget that its updates cost: they are whole."""
    seconds: float
    """Of its updates, as calibrated."""
    flops: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant.name}, budget {self.budget:g}, seed {self.seed}"


class Setting(NamedTuple):
    """What runs train on: so many training images, and the changes that lead there."""

    num_samples: int
    overrides: dict[str, Any]


def base_of(study: Study) -> Path:
    """The base configuration: the study's own copy, once it is there."""
    copy = study.folder / BASE
    return copy if copy.exists() else study.base


def variants(study: Study) -> dict[str, list[Variant]]:
    """For each method its trials, in the order of its grid; a method that is not tuned has one."""
    found: dict[str, list[Variant]] = {}
    for name, method in study.methods.items():
        choices = [dict(zip(method.grid, values, strict=True)) for values in itertools.product(*method.grid.values())]
        found[name] = [
            Variant(name, number, values, study.overrides | method.overrides | values)
            for number, values in enumerate(choices)
        ]
    return found


def check(study: Study) -> None:
    """Raise UserError for the first configuration of the study that is refused."""
    for variant in [variant for trials in variants(study).values() for variant in trials]:
        cfg = config.load(base_of(study), words(variant.overrides))
        if study.accuracy == "averaged" and cfg.train.average == "none":
            raise UserError(f"accuracy = averaged: {variant.name} has train.average = none; set it in overrides")
        if study.is_tuned and cfg.data.stream:
            raise UserError("data.stream: nothing can be held out of it for grids; give data.path with training shards")


def words(overrides: dict[str, Any]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def trials(study: Study, costs: dict[str, Cost], setting: Setting) -> Iterator[Planned]:
    """The runs that choose the values of grids, seed by seed."""
    budget = study.tuning.budget or min(study.budgets)
    for seed in study.tuning.seeds:
        for variant in [variant for choices in variants(study).values() for variant in choices]:
            folder = study.folder / "tuning" / variant.method / f"trial_{variant.number}"
            yield _planned(study, Place(variant, budget, seed, folder), costs, setting)


def runs(study: Study, chosen: dict[str, Variant], costs: dict[str, Cost], setting: Setting) -> Iterator[Planned]:
    """The runs that are compared, seed by seed, so that an unfinished study is balanced."""
    for seed in study.seeds:
        for budget in sorted(study.budgets):
            for variant in chosen.values():
                folder = study.folder / "runs" / variant.method
                yield _planned(study, Place(variant, budget, seed, folder), costs, setting)


class Place(NamedTuple):
    """Where in a study a run stands."""

    variant: Variant
    budget: float
    seed: int
    folder: Path
    """Of all runs of its method."""


def _planned(study: Study, place: Place, costs: dict[str, Cost], setting: Setting) -> Planned:
    variant, budget, seed, folder = place
    first = variants(study)[next(iter(study.methods))][0]
    cost, unit = costs[variant.name], costs[first.name].of_an_image(study.equal)
    base = base_of(study)
    epochs = round(budget * unit / cost.of_an_image(study.equal), 6)
    stretched = _stretched(config.load(base, words(variant.overrides)), epochs)
    folder = folder / f"budget_{budget:g}" / f"seed_{seed}"
    overrides = words(variant.overrides | setting.overrides | stretched | {"run.folder": str(folder), "run.seed": seed})
    cfg = config.load(base, overrides)
    updates = final_step(cfg, Progress(), setting.num_samples, cost.images)
    used = updates * cost.images * cost.of_an_image(study.equal) / (budget * setting.num_samples * unit)
    seconds, flops = updates * cost.seconds, updates * cost.flops
    return Planned(variant, budget, seed, folder, tuple(overrides), _hash(cfg), epochs, updates, used, seconds, flops)


def _stretched(cfg: config.Config, epochs: float) -> dict[str, Any]:
    """Keys that train for `epochs` as `cfg` does for its own: all that is counted in epochs is longer or shorter."""
    factor = epochs / cfg.train.epochs
    values: dict[str, Any] = {
        "train.epochs": epochs,
        "train.max_steps": 0,
        "optim.warmup_epochs": cfg.optim.warmup_epochs * factor,
    }
    if cfg.optim.step_epochs:
        values["optim.step_epochs"] = [epoch * factor for epoch in cfg.optim.step_epochs]
    if cfg.data.progressive:
        values["data.progressive"] = [[epoch * factor, size] for epoch, size in cfg.data.progressive]
    for key in type(cfg.method).model_fields:
        value = getattr(cfg.method, key)
        if isinstance(value, Schedule) and value.changes:
            knots = tuple((epoch * factor, entry) for epoch, entry in value.knots)
            values[f"method.{key}"] = Schedule(knots, value.linear).plain()
    return values


def _hash(cfg: config.Config) -> str:
    learned = {key: value for key, value in config.flat(cfg).items() if key.partition(".")[0] not in NOT_LEARNED}
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:12]
