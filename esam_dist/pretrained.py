"""The weights that a new run begins with, as `model.weights` says."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from esam_dist import config
from esam_dist.checkpoint import STEP, Checkpoints, read
from esam_dist.errors import UserError, printable
from esam_dist.models.published import is_published, published
from esam_dist.models.taken import take
from esam_dist.models.weights import Weights, bare, read_weights
from esam_dist.resume import named

logger = logging.getLogger(__name__)
KEY = "model.weights"


def begin(cfg: config.Config, network: nn.Module) -> None:
    """Put the weights that `cfg` names into the bare `network`, and say what was taken.

    Raises UserError where there are none, or they do not fit.
    """
    wanted = cfg.model.weights
    if is_published(wanted):
        source, weights = wanted, published(cfg.model.name, wanted)
    else:
        source, weights = _saved(Path(wanted))
    source = f"{KEY} = {printable(source)}"
    logger.info("%s: %s", source, take(network, weights, source, cfg.model.name))


def _saved(path: Path) -> tuple[str, Weights]:
    """Weights at `path`, and where they were: of a run the best checkpoint, or the newest where none was validated."""
    if not (path.is_dir() or STEP.fullmatch(path.name)):
        return str(path), read_weights(path, KEY)
    best = Checkpoints(path / "checkpoints", keep=1).best() if (path / "checkpoints").is_dir() else None
    if best is None and path.is_dir() and not ((path / "checkpoints").is_dir() or (path / "state.pt").exists()):
        raise UserError(f"{KEY} = {path}: is no run and no checkpoint of ours; give a file, a run or a checkpoint")
    found, state = (best, read(best)) if best else named(str(path), path.parent, KEY)
    return str(found), bare(state["engine"]["model"], f"{KEY} = {found}")
