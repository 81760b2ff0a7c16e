"""Distributed sharpness-aware training of image classifiers: ESAM on PyTorch DDP and DeepSpeed.

SharpnessAware    a model, its optimizer and a method, for a training loop of your own
methods           what trains it: `methods.ESAM(rho=0.05)`, `methods.SAM()`, ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esam_dist import methods
    from esam_dist.sharpness_aware import SharpnessAware

__version__ = "0.1.0"
__all__ = ["SharpnessAware", "__version__", "methods"]


def __getattr__(name: str) -> Any:
    """Both are imported when they are asked for: a loader's worker needs neither."""
    if name == "SharpnessAware":
        return import_module("esam_dist.sharpness_aware").SharpnessAware
    if name == "methods":
        return import_module("esam_dist.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
