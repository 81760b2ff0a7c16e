"""The classes of a run, and the classes of other data among them, by name."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from esam_dist import config
from esam_dist.data.dataset import read_description
from esam_dist.errors import UserError, printable
from esam_dist.soundness import State


def run_classes(cfg: config.Config, state: State) -> list[str]:
    """The names of the classes that a checkpoint was trained on, in the order of its network's outputs.

    One of an earlier version does not name them: then the run's data must be there. Raises UserError where it is not.
    """
    card = state.get("card")
    names = card.get("classes") if isinstance(card, dict) else None
    return names or read_description(cfg.data.path).classes


def output_names(names: Sequence[str], num_outputs: int) -> list[str]:
    """A name for each output of a network, which may have more than there are classes."""
    return [*names, *(f"output {number}" for number in range(len(names), num_outputs))]


def places(of_data: Sequence[str], of_run: Sequence[str], path: Path) -> list[int]:
    """Which of the run's classes each class of the data at `path` is. Raises UserError for one that the run lacks."""
    if [*of_data] == [*of_run]:
        return [*range(len(of_run))]
    numbers = {_same(name): number for number, name in enumerate(of_run)}
    for which, names in (("the run", of_run), (str(path), of_data)):
        twice = [name for name, count in Counter(map(_same, names)).items() if count > 1]
        if twice:
            raise UserError(
                f"--data {path}: {which} has two classes of the name {_shown(twice[:1])}, so that names do not say "
                "which is which; prepare the data with one name for each class"
            )
    unknown = [name for name in of_data if _same(name) not in numbers]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"--data {path}: the run has no class {_shown(unknown[:5])}{more}; it knows {_shown(of_run[:5])}"
            f"{', ...' if len(of_run) > 5 else ''}: leave such classes out, or name them alike"
        )
    return [numbers[_same(name)] for name in of_data]


def _same(name: str) -> str:
    # File systems disagree on how an accent is written.
    return unicodedata.normalize("NFC", name)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(repr(printable(name)) for name in names)
