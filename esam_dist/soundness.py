"""What makes the state in a checkpoint sound: its parts are there, of the right kinds, and finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
MOST = 1 << 53
"""No run counts so far, and arithmetic in 64 bits holds up to there."""
LATER = {"sharp_updates": 0, "skipped_in_a_row": 0}
"""Counts that checkpoints of earlier versions may lack."""
COUNTS = ("step", "samples_seen", *LATER)
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def fault(state: object) -> str | None:
    """What is wrong with `state`, in a few words; None: nothing."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__}, not a run's state"
    missing = _missing(state)
    if missing:
        return f"holds no {missing} that could be read"
    try:
        name = unsound(state)
    except RecursionError:
        return "is nested deeper than any state is"
    return f"{name} is not finite" if name else None


def unsound(state: State) -> str | None:
    """The name of the first value that training goes on from and that is not finite: of engine, method or average."""
    return not_finite(state.get("engine")) or next(
        (name for part in ("method", "average") if (name := not_finite(state.get(part), part))), None
    )


def not_finite(state: object, name: str = "") -> str | None:
    """The name of the first value within `state` (tables, lists, tensors, numbers) that is infinite or no number."""
    if isinstance(state, Tensor):
        # Whole numbers and truth values are finite.
        floating = state.is_floating_point() or state.is_complex()
        return None if not floating or bool(torch.isfinite(state).all()) else name
    if isinstance(state, float):
        return None if math.isfinite(state) else name
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in entries:
        found = not_finite(value, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


def _missing(state: State) -> str | None:
    engine, train = state.get("engine"), state.get("train")
    if not isinstance(engine, dict) or not _is_table(engine.get("model")):
        return "weights (engine.model)"
    optimizer = engine.get("optimizer")
    if not isinstance(optimizer, dict) or not all(map(_is_table, optimizer.values())):
        return "optimizer state (engine.optimizer)"
    scaler = engine.get("scaler", {})
    if not isinstance(scaler, dict) or (scaler and not all(_is_number(scaler.get(key)) for key in SCALER)):
        return "scale of float16 (engine.scaler)"
    if not isinstance(train, dict) or not all(_is_count(train.get(key, LATER.get(key))) for key in COUNTS):
        return "place in the run (train.step, train.samples_seen)"
    method = state.get("method", {})
    if not isinstance(method, dict) or not all(map(_is_vector, method.values())):
        return "memory of the method (method)"
    return None if _is_average(state.get("average", {})) else "average of the weights (average)"


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())


def _is_vector(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_plain, value))


def _is_average(value: object) -> bool:
    """What `WeightAverage` saves; nothing where none was asked for."""
    if not isinstance(value, dict):
        return False
    copies, statistics = value.get("copies"), value.get("statistics", {})
    known = isinstance(value.get("kind"), str) and _is_count(value.get("updates"))
    return not value or (known and isinstance(copies, list) and all(map(_is_table, copies)) and _is_table(statistics))


def _is_plain(value: object) -> bool:
    """Whether `value` is a tensor of real numbers that has all of them in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
