"""The keys of `model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esam_dist.section import Count, Real, Section


class ModelKeys(Section):
    """The network, by name, and what it begins with."""

    name: str = "cifar_resnet8"
    """A torchvision classifier (`resnet50`, `vit_b_16`, ...), one of ours (`cifar_resnet8`, ...), or one of timm's as
    `timm/NAME` (extra `timm`)."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Outputs of the classifier; empty: as many as the data has classes."""
    options: dict[str, bool | int | Real | str | list[Count]] = {}
    """What the network's builder is told besides: `{stochastic_depth_prob: 0.1, dropout: 0.1}`."""
    weights: str = ""
    """What a new run begins with: a file of weights (`.pth`, `.pt`, `.safetensors`), a run or a checkpoint of ours, or
    `default`, the published ones; empty: fresh ones. For another number of classes the classifier is made anew."""
    freeze: Literal["all_but_head"] | list[str] = []
    """Patterns of parameter names that are not trained (`[conv1.*, layer1.*]`), or `all_but_head`. A BatchNorm that is
    frozen whole normalises by its statistics, which stay."""
    sync_batchnorm: bool = False
    """BatchNorm over the batches of all ranks (GPUs only). Not for methods that perturb some of the weights."""
