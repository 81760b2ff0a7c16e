"""`esam-dist config --check`: the keys are known to be valid; so may be the network and, where it is, the data."""

from __future__ import annotations

import torch

from esam_dist import config
from esam_dist.data.dataset import open_split
from esam_dist.errors import UserError
from esam_dist.models import build_model


def told(cfg: config.Config) -> str:
    """`valid`, or that only the data is not there. Raises UserError for an unknown network, or data that is damaged."""
    if not cfg.data.path.exists():
        _check_network(cfg, cfg.model.num_classes or 2)
        return f"valid; but data.path = {cfg.data.path} is not there, so the data was not looked at"
    validation = open_split(cfg.data.path, "validation")
    if not cfg.data.stream:
        num_samples = open_split(cfg.data.path, "train").num_samples
        if num_samples < cfg.data.batch_size:
            raise UserError(f"data.batch_size = {cfg.data.batch_size}: {cfg.data.path} has {num_samples} samples")
    _check_network(cfg, len(validation.class_names))
    return "valid"


def _check_network(cfg: config.Config, num_classes: int) -> None:
    with torch.device("meta"):  # without memory, and without the time that weights take
        build_model(cfg.model.name, num_classes)
