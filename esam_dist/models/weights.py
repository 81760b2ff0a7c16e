"""Files of weights: from what somebody has saved to names and tensors as the bare network has them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esam_dist.errors import UserError, printable

Weights = dict[str, Tensor]

# Where training scripts put the weights beside other things; ours, timm's and torchvision's among them.
WITHIN = ("state_dict", "model", "model_state_dict", "module", "engine", "state_dict_ema", "model_ema")
# Of torch.compile, DistributedDataParallel, ours, and Lightning's.
PREFIXES = ("_orig_mod.", "module.", "network.", "model.")
_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)")


def read_weights(path: Path, key: str) -> Weights:
    """The weights in the file at `path`, the value of `key`: nothing but tensors and plain values is ever unpickled.

    Raises UserError for a file that cannot be read, or holds no weights.
    """
    source = f"{key} = {printable(str(path))}"
    try:
        state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error}); give a file of weights") from None
    except Exception as error:  # whatever pickle, torch and safetensors make of a file that is none of theirs
        reason = " ".join(str(error).split())
        if "weights_only" in reason or "Unsupported" in reason:
            reason = "it holds Python objects, which are not unpickled, as they could run anything"
        raise UserError(
            f"{source}: holds no weights that could be read ({printable(reason[:120])}); give a state_dict, as "
            "torch.save(model.state_dict(), PATH) writes it, or a .safetensors file"
        ) from None
    return bare(state, source)


def bare(state: object, source: str) -> Weights:
    """The table of weights in `state`, without the prefixes that wrappers add. Raises UserError where there is none."""
    found = _table(state)
    if found is None:
        raise UserError(f"{source}: holds no table of weights (a state_dict); give a file that does")
    # A count beside the weights that torch.optim.swa_utils averages.
    weights = {name: value for name, value in found.items() if name != "n_averaged"}
    while True:
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    # Parts that were compiled by themselves; and the names of densenet before 2018, which published files still have.
    weights = {name.replace("._orig_mod.", "."): value for name, value in weights.items()}
    return {_DENSENET.sub(r"\1\2", name): value for name, value in weights.items()}


def _table(state: object) -> Weights | None:
    """The first table of tensors in `state`, which may lie within others."""
    if not isinstance(state, dict):
        return None
    if state and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        return dict(state)
    return next((found for name in WITHIN if (found := _table(state.get(name))) is not None), None)


def _pickled(path: Path) -> Any:
    # The scripts of torchvision and timm save their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path) -> Weights:
    from safetensors.torch import load_file

    weights: Weights = load_file(path)
    return weights
