"""The keys of `model`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esam_dist.section import Section


class ModelKeys(Section):
    """The network, by name."""

    name: str = "cifar_resnet8"
    """A torchvision classifier (`resnet50`, `vit_b_16`, ...) or one of ours (`cifar_resnet8`, ...)."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Outputs of the classifier; empty: as many as the data has classes."""
