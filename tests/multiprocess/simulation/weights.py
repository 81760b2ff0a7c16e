"""Vectors over the weights, by name; one that lacks a name is zero there."""

from __future__ import annotations

import math

from torch import Tensor

Weights = dict[str, Tensor]


def plus(left: Weights, right: Weights, factor: float = 1.0) -> Weights:
    """`left + factor * right`, over the names of `left`."""
    return {name: value + factor * right[name] if name in right else value for name, value in left.items()}


def times(vector: Weights, factor: float) -> Weights:
    return {name: factor * value for name, value in vector.items()}


def dot(left: Weights, right: Weights) -> float:
    return float(sum((left[name] * right[name]).sum() for name in left))


def norm(vector: Weights) -> float:
    return math.sqrt(dot(vector, vector))


def mean(vectors: list[Weights]) -> Weights:
    return {name: sum(vector[name] for vector in vectors) / len(vectors) for name in vectors[0]}
