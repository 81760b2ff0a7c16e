"""Which images a network takes: one pass on the meta device, without memory or arithmetic, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn

from esam_dist.errors import UserError
from esam_dist.models.build import OURS

USUAL = (224, 299, 256, 384)


def refuse_size(name: str, network: nn.Module, size: int, batch_size: int, key: str) -> None:
    """Raise UserError where the network `name` cannot be trained on `batch_size` images of `size` pixels.

    `key` is what holds the size. A network that the meta device cannot compute is let pass.
    """
    reason = _fault(network, batch_size, size)
    if not reason:
        return
    what = f"{key} = {size}: model.name = {name} takes no images of {size} pixels ({reason})"
    if batch_size == 1 and not _fault(network, 2, size):
        raise UserError(
            f"data.batch_size = 1 (or method.group_size): model.name = {name} normalises a batch of more than one "
            f"image ({reason}); set 2 or more"
        )
    fits = next((other for other in (nominal_size(name, network), *USUAL) if not _fault(network, 2, other)), None)
    if fits is not None:
        other = f", or model.options = {{image_size: {size}}}" if _takes_any(network, size) else ""
        raise UserError(f"{what}; set {key} = {fits}{other}")


def nominal_size(name: str, network: nn.Module) -> int:
    """The size of the images that the network `name` is published for."""
    published = getattr(network, "default_cfg", None)
    if isinstance(published, Mapping):
        return int(published["input_size"][-1])
    if name in OURS:
        return 224 if name.startswith("vit") else 32
    try:
        return int(torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"])
    except (ValueError, AttributeError, KeyError):
        return USUAL[0]


def _fault(network: nn.Module, batch_size: int, size: int) -> str:
    """What is wrong with such images, in a few words; empty: nothing, or it cannot be told."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    on_meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    images = torch.empty(batch_size, 3, size, size, device="meta")
    try:
        with torch.no_grad():
            outputs = torch.func.functional_call(network, on_meta, (images,))
    except NotImplementedError:
        return ""
    except Exception as error:  # whatever a network makes of images that it does not fit
        return " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == batch_size:
        return ""
    return "it does not give one vector of outputs per image"


def _takes_any(network: nn.Module, size: int) -> bool:
    """Whether the network can be built for images of `size`: a vision transformer's position table."""
    patch = getattr(network, "patch_size", None)
    return isinstance(patch, int) and size % patch == 0 and "image_size" in inspect.signature(type(network)).parameters
