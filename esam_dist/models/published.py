"""Weights that others have published: torchvision's from its cache, timm's from Hugging Face's."""

from __future__ import annotations

import logging
import re
import socket
from pathlib import Path
from typing import Any

import torch
import torchvision

from esam_dist.errors import UserError
from esam_dist.models.build import AUXILIARY, OURS, TIMM, imported_timm
from esam_dist.models.weights import Weights, bare, read_weights

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
"""That the server of a download may keep us waiting."""


def is_published(wanted: str) -> bool:
    """Whether `model.weights` means published ones: `default`, or torchvision's name for them (`IMAGENET1K_V2`)."""
    return wanted == "default" or re.fullmatch(r"[A-Z][A-Z0-9_]+", wanted) is not None


def published_options(name: str, wanted: str) -> dict[str, Any]:
    """What a network must be built with for published weights: some expect images normalised in another way."""
    return {"transform_input": True} if name in AUXILIARY and is_published(wanted) else {}


def published(name: str, wanted: str) -> Weights:
    """The published weights of the network `name`. Raises UserError where there are none, or they cannot be had."""
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), wanted)
    if name in OURS:
        raise UserError(f"model.weights = {wanted}: nobody has published any for model.name = {name}; give a file")
    kinds = torchvision.models.get_model_weights(name)
    if wanted != "default" and wanted not in kinds.__members__:
        raise UserError(
            f"model.weights = {wanted}: for model.name = {name} there are {', '.join(kinds.__members__)}; give one of "
            "them, default, or a file"
        )
    url = (kinds.DEFAULT if wanted == "default" else kinds[wanted]).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        fetch(url, path, wanted)
    return read_weights(path, "model.weights")


def fetch(url: str, path: Path, wanted: str) -> None:
    """Download `url` to `path`, whose name holds the beginning of its checksum. Raises UserError where that fails."""
    logger.info("model.weights = %s: fetching %s", wanted, url)
    prefix = re.search(r"-([0-9a-f]+)\.", path.name)
    before = socket.getdefaulttimeout()
    # Torch gives no timeout, and would wait for ever.
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=False)
    except Exception as error:  # of the network, the server, the disk, or the checksum
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"model.weights = {wanted}: {path} is not there and cannot be fetched ({reason}); where there is a "
            f"network fetch {url}, and put it there"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _timm(name: str, wanted: str) -> Weights:
    """From the cache only: which file it is, timm knows, and what to rename in it."""
    timm = imported_timm(name)
    if wanted != "default":
        raise UserError(f"model.weights = {wanted}: timm names weights in model.name (timm/NAME.TAG); give default")
    published_as = timm.models.get_pretrained_cfg(name)
    repository = published_as.hf_hub_id if published_as is not None else None
    if not repository:
        raise UserError(f"model.weights = default: timm has no file for model.name = {TIMM + name}; give a file")
    from huggingface_hub import try_to_load_from_cache

    files = (published_as.hf_hub_filename or "model.safetensors", "pytorch_model.bin")
    cached = next((found for file in files if isinstance(found := try_to_load_from_cache(repository, file), str)), None)
    if cached is None:
        raise UserError(
            f"model.weights = default: {files[0]} of {repository} is not in the cache; where there is a network run "
            f"`hf download {repository} {files[0]}`, and copy the cache (HF_HOME)"
        )
    made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached})
    return bare(made.state_dict(), "model.weights = default")
