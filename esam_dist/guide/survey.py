"""What `init` looks at before it proposes anything: the prepared images, the device, and the network."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esam_dist.data.dataset import SampleError, open_split, read_description
from esam_dist.data.decode import ImageFile
from esam_dist.errors import UserError
from esam_dist.models import build_model

LOOKED_AT = 64
"""Images whose size is read."""
SIZES = (224, 299, 384, 75)
"""Tried for a network that does not take the size that the images would have."""


@dataclass(frozen=True)
class Images:
    """A prepared folder."""

    path: Path
    train: int
    validation: int
    classes: int
    short_side: int
    """Median of the shorter sides, in pixels."""


@dataclass(frozen=True)
class Device:
    """What will train: GPUs, all alike, or a CPU."""

    gpus: int
    memory: int
    """Bytes of each GPU."""
    has_bfloat16: bool
    cores: int

    @property
    def ranks(self) -> int:
        """One per GPU."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Network:
    """A network as it would be trained."""

    name: str
    image_size: int
    parameters: int
    activations: int
    """Bytes that the forward pass of an image keeps, in float32."""
    has_batchnorm: bool


def look_at_images(root: Path) -> Images:
    """Counts and sizes of the images below `root`. Raises UserError for what is no prepared folder."""
    description = read_description(root)
    train, validation = open_split(root, "train"), open_split(root, "validation")
    sides = []
    for sample in range(0, train.num_samples, -(-train.num_samples // LOOKED_AT)):
        try:
            image = ImageFile(train.read(sample))
        except SampleError:
            continue
        sides.append(min(image.width, image.height))
    train.close()
    if not sides:
        raise UserError(f"data.path = {root}: none of {LOOKED_AT} images can be read; see `esam-dist prepare verify`")
    side = round(statistics.median(sides))
    return Images(root, train.num_samples, validation.num_samples, len(description.classes), side)


def look_at_device() -> Device:
    """The GPUs of this machine, or its cores."""
    gpus = torch.cuda.device_count()
    memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)), default=0)
    return Device(gpus, memory, gpus > 0 and torch.cuda.is_bf16_supported(), os.cpu_count() or 1)


def look_at_network(name: str, num_classes: int, image_size: int) -> Network:
    """The network at `image_size`, or at the first size that it takes. Raises UserError where there is none."""
    for size in (image_size, *SIZES):
        with torch.device("meta"):
            network = build_model(name, num_classes)
        kept = _activations(network, size)
        if kept is not None:
            parameters = sum(param.numel() for param in network.parameters())
            has_batchnorm = any(isinstance(module, _BatchNorm) for module in network.modules())
            return Network(name, size, parameters, kept, has_batchnorm)
    tried = ", ".join(map(str, (image_size, *SIZES)))
    raise UserError(f"model.name = {name}: takes no images of {tried} pixels; give --model another one")


def _activations(network: nn.Module, size: int) -> int | None:
    """Bytes that all layers put out for an image, without computing any; None where the network refuses the size."""
    kept = 0

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal kept
        kept += output.numel() * 4 if isinstance(output, Tensor) else 0

    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(note)
    try:
        # Of two: BatchNorm refuses a single value.
        network(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return None
    return kept // 2
