"""From configuration to network."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from esam_dist import config
from esam_dist.engine.groups import param_groups
from esam_dist.errors import UserError
from esam_dist.models import Classifier, build_model, compile_network
from esam_dist.models.freeze import freeze
from esam_dist.models.published import published_options
from esam_dist.models.sizes import refuse_size
from esam_dist.ranks import Ranks

logger = logging.getLogger(__name__)


def build_network(cfg: config.Config, data_classes: int, device: torch.device) -> Classifier:
    """The classifier on `device`, as the method needs it; its first weights are a function of `run.seed`.

    Raises UserError where `model.num_classes` does not go together with the `data_classes` of the data, or the network
    not with the size of the images.
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
    network = build_model(cfg.model.name, num_classes, builder_options(cfg))
    _refuse_sizes(cfg, network)
    classifier = Classifier(network, cfg.train.precision, channels_last=cfg.train.channels_last).to(device)
    freeze(classifier, cfg.model.freeze)
    try:
        cfg.method.prepare(classifier)
    except UserError as error:
        raise UserError(f"model.name = {cfg.model.name}: {error}") from None
    if cfg.train.compile:
        compile_network(network, by_block=cfg.method.stops_early)
    if cfg.train.precision == "fp16" and device.type == "cpu" and os.environ.get("RANK", "0") == "0":
        logger.warning("train.precision = fp16: a CPU computes it many times slower than fp32; it is meant for GPUs")
    return classifier


def builder_options(cfg: config.Config) -> dict[str, Any]:
    """What the network's builder is told: what published weights need, and what the configuration says."""
    return published_options(cfg.model.name, cfg.model.weights) | cfg.model.options


def prepare_training(cfg: config.Config, classifier: Classifier, ranks: Ranks) -> None:
    """What only training needs of `classifier`.

    Raises UserError for a batch that it cannot be trained on, and for rates of parameters that it does not have.
    """
    param_groups(classifier, cfg.optim)
    batch_size = cfg.data.batch_size // cfg.method.num_groups(cfg.data.batch_size)
    if batch_size == 1:
        refuse_size(cfg.model.name, classifier.network, cfg.data.image_size, batch_size, "data.image_size")
    if cfg.model.sync_batchnorm and ranks.world_size > 1:
        _synchronise_batchnorm(cfg, classifier, ranks)


def _synchronise_batchnorm(cfg: config.Config, classifier: Classifier, ranks: Ranks) -> None:
    """Let BatchNorm normalise over the batches of all ranks.

    Raises UserError on a CPU, for which torch has none, and for a method whose ranks make unlike backward passes: each
    waits for the others in every layer, so that they would wait for ever.
    """
    if ranks.device.type == "cpu":
        raise UserError("model.sync_batchnorm = true needs GPUs: torch has none for CPUs; set it to false")
    if "part" in cfg.method.needs():
        raise UserError(
            f"model.sync_batchnorm = true waits for all ranks in each layer, and method.name = {cfg.method.name} draws "
            "weights on each rank, so that backward passes end at unlike layers: give method.beta = 1 and method.swp = "
            "tensor, or sync_batchnorm = false"
        )
    held = {name: classifier.network.get_submodule(name) for name in classifier.held}
    classifier.network = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.network)  # type: ignore[no-untyped-call]
    for name, layer in held.items():
        # It normalises by the statistics that stay, and waits for nobody.
        above, _, own = name.rpartition(".")
        setattr(classifier.network.get_submodule(above), own, layer)
    classifier.train(classifier.training)


def _refuse_sizes(cfg: config.Config, network: nn.Module) -> None:
    sizes = [(cfg.data.image_size, "data.image_size")]
    sizes += [(int(size), "data.progressive") for _, size in cfg.data.progressive]
    for size, key in sizes:
        refuse_size(cfg.model.name, network, size, 2, key)
