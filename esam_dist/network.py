"""From configuration to network."""

from __future__ import annotations

import torch

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.models import Classifier, build_model, compile_network


def build_network(cfg: config.Config, data_classes: int, device: torch.device) -> Classifier:
    """The classifier on `device`, as the method needs it; its first weights are a function of `run.seed`.

    Raises UserError where `model.num_classes` does not go together with the `data_classes` of the data.
    """
    num_classes = cfg.model.num_classes or data_classes
    if num_classes < data_classes:
        raise UserError(
            f"model.num_classes = {num_classes} is fewer than the {data_classes} classes of {cfg.data.path}; "
            "leave it empty or raise it"
        )
    if num_classes > data_classes and (cfg.data.mixup or cfg.data.cutmix):
        raise UserError(
            f"model.num_classes = {num_classes}: mixup and CutMix make labels of the {data_classes} classes of "
            f"{cfg.data.path}; leave it empty, or set data.mixup = 0 and data.cutmix = 0"
        )
    torch.manual_seed(cfg.run.seed)
    network = build_model(cfg.model.name, num_classes)
    classifier = Classifier(network, cfg.train.precision, channels_last=cfg.train.channels_last).to(device)
    try:
        cfg.method.prepare(classifier)
    except UserError as error:
        raise UserError(f"model.name = {cfg.model.name}: {error}") from None
    if cfg.train.compile:
        compile_network(network, by_block=cfg.method.stops_early)
    return classifier
