"""The base optimizer alone: the control of every comparison. Cost: 1.00 of itself."""

from __future__ import annotations

from typing import Literal

from esam_dist.methods.method import Method


class SGD(Method):
    """No perturbation: one gradient at `w`, whatever the optimizer (AdamW too)."""

    name: Literal["sgd"] = "sgd"
