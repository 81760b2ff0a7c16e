"""What a method may need that not every engine can do: the one rule by which a combination is refused."""

from __future__ import annotations

ZERO3_CANNOT = {
    "part": "draw some of the weights (give method.beta = 1 and method.swp = tensor)",
    "momentum": "climb along the momentum",
    "memory": "remember a vector from step to step",
    "mix": "recycle a gradient",
    "groups": "perturb groups of a batch apart (give method.group_size = 0)",
}
"""By the name of a need (`Method.needs`), what ZeRO 3 cannot do: no rank holds the weights whole, so that all ranks
share one perturbation of all of them, along the averaged gradient."""


def zero3_refusal(name: str, needs: set[str]) -> str:
    """Why ZeRO 3 cannot train the method `name`, in one line; empty where it can."""
    lacks = [words for need, words in ZERO3_CANNOT.items() if need in needs]
    if not lacks:
        return ""
    return (
        f"engine.zero_stage = 3 shards the weights, so it cannot {' or '.join(lacks)}, which method.name = {name} does "
        "as it is configured; use engine.zero_stage 0, 1 or 2, or a method such as sam, asam or gsam"
    )
