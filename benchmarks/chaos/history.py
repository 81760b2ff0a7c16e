"""What a job was trained on in the end: of all its starts only what a later one did not do again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


@dataclass
class Incarnation:
    """One process of a rank: from which global position, and how many batches it took."""

    start: int
    taken: list[int] = field(default_factory=list)


def incarnations(folder: Path, rank: int) -> dict[str, Incarnation]:
    """The processes of a rank that came to training, in order."""
    found: dict[str, Incarnation] = {}
    for who, *words in _lines(folder / f"taken_{rank}"):
        if words[0] == "from":
            found[who] = Incarnation(int(words[1]))
        else:
            found[who].taken.append(int(words[0]))
    return found


def effective(folder: Path, rank: int, samples_per_step: int) -> dict[int, list[int]]:
    """The samples that a rank was trained on, by the global position at which the update begins.

    What a process took behind the position at which the next one began is gone with its weights.
    """
    drawn = {(who, int(number)): list(map(int, ids)) for who, number, *ids in _lines(folder / f"drawn_{rank}")}
    kept: dict[int, list[int]] = {}
    for who, process in incarnations(folder, rank).items():
        kept = {position: ids for position, ids in kept.items() if position < process.start}
        for number in process.taken:
            kept[process.start + number * samples_per_step] = drawn[who, number]
    return kept


def faults(folder: Path, ranks: int, batch: int, steps: int, num_samples: int) -> list[str]:
    """What is wrong with the effective history of a job that has made `steps`: nothing, if all is well.

    Every step is there once on every rank, and every whole epoch has every sample exactly once.
    """
    wrong = []
    by_rank = [effective(folder, rank, ranks * batch) for rank in range(ranks)]
    expected = [step * ranks * batch for step in range(steps)]
    for rank, kept in enumerate(by_rank):
        if sorted(kept) != expected:
            lacking, extra = sorted(set(expected) - set(kept)), sorted(set(kept) - set(expected))
            wrong.append(f"rank {rank}: positions {lacking[:5]} missing, {extra[:5]} too many")
    if wrong:
        return wrong
    sequence = [sample for position in expected for kept in by_rank for sample in kept[position]]
    for epoch in range(len(sequence) // num_samples):
        counts = Counter(sequence[epoch * num_samples : (epoch + 1) * num_samples])
        twice = sorted(sample for sample, count in counts.items() if count > 1)
        missing = sorted(set(range(num_samples)) - set(counts))
        if twice or missing:
            wrong.append(f"epoch {epoch}: samples {twice[:5]} twice, {missing[:5]} missing")
    return wrong


class Position(NamedTuple):
    """Where rank 0 works."""

    who: str
    """Its process."""
    start: int
    """The update at which that process began."""
    step: int
    """Updates that precede the one that it works at."""


def position(folder: Path, samples_per_step: int) -> Position | None:
    """Where rank 0 works; None before the first batch.

    Reads the end of the log only: it is asked many times a second.
    """
    try:
        with (folder / "taken_0").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - (1 << 16)))
            lines = [line.split() for line in file.read().decode().splitlines()]
    except OSError:
        return None
    place = next((place for place in reversed(range(len(lines))) if "from" in lines[place]), None)
    if place is None or place == len(lines) - 1:
        return None
    who, _, start = lines[place]
    begun = int(start) // samples_per_step
    return Position(who, begun, begun + len(lines) - place - 2)


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
