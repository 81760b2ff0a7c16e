"""All measures of one checkpoint, as plain values."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from esam_dist.sharpness import hessian, landscape, perturbed
from esam_dist.sharpness.hessian import Estimate
from esam_dist.sharpness.objective import Objective, norm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to measure; a count of 0 leaves its part out."""

    eigenvalues: int = 3
    tolerance: float = 1e-3
    probes: int = 10
    rhos: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1, 0.2])
    group_sizes: list[int] = field(default_factory=lambda: [32])
    """The m of m-sharpness."""
    draws: int = 5
    adaptive: bool = False
    line: int = 0
    plane: int = 0
    half_width: float = 1.0
    """How far the landscape reaches; 1 moves each filter by its own norm."""
    seed: int = 0


def measure(objective: Objective, wanted: Wanted) -> dict[str, Any]:
    """Measure `objective` at its present weights, which stay as they are. All ranks take part; all get the result.

    Numbers with an error are `[mean, standard error]`. Compare checkpoints by the same samples, m and rho only.
    """
    found: dict[str, Any] = {
        "samples": objective.num_samples,
        "parameters": objective.size,
        "loss": objective.loss(),
        "gradient_norm": norm(objective.gradient()),
    }
    if wanted.eigenvalues:
        with _timed("largest eigenvalues of the Hessian"):
            found["eigenvalues"] = hessian.largest_eigenvalues(
                objective, wanted.eigenvalues, tolerance=wanted.tolerance, seed=wanted.seed
            )
    if wanted.probes:
        with _timed("trace of the Hessian"):
            found["trace"] = list(hessian.trace(objective, wanted.probes, seed=wanted.seed))
    if wanted.rhos:
        found |= _rises(objective, wanted)
    found |= _landscape(objective, wanted)
    return found


def _rises(objective: Objective, wanted: Wanted) -> dict[str, Any]:
    found: dict[str, Any] = {"rho": wanted.rhos, "adaptive": wanted.adaptive, "m_sharpness": {}}
    for m in wanted.group_sizes:
        with _timed(f"{m}-sharpness"):
            rises = perturbed.worst_case(objective, wanted.rhos, m, adaptive=wanted.adaptive)
        found["m_sharpness"][str(m)] = _plain(rises)
    if wanted.draws:
        with _timed("rise along random directions"):
            rises = perturbed.average_case(
                objective, wanted.rhos, wanted.draws, adaptive=wanted.adaptive, seed=wanted.seed
            )
        found["average_rise"] = _plain(rises)
    return found


def _landscape(objective: Objective, wanted: Wanted) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if wanted.line:
        places = landscape.evenly(wanted.half_width, wanted.line)
        with _timed("landscape along a line"):
            found["line"] = {"place": places, "loss": landscape.along_line(objective, places, seed=wanted.seed)}
    if wanted.plane:
        places = landscape.evenly(wanted.half_width, wanted.plane)
        with _timed("landscape on a plane"):
            found["plane"] = {"place": places, "loss": landscape.on_plane(objective, places, seed=wanted.seed)}
    return found


def _plain(rises: list[Estimate]) -> list[list[float]]:
    return [list(rise) for rise in rises]


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Says in the log how long a part took."""
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - start)
