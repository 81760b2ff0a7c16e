"""Which weights are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from esam_dist.errors import UserError
from esam_dist.layers import head, matching, named_weights
from esam_dist.models.classifier import Classifier

KEY = "model.freeze"


def freeze(classifier: Classifier, which: str | Sequence[str]) -> None:
    """Freeze what `model.freeze` names, and hold a BatchNorm in evaluation mode whose parameters are all frozen.

    Its statistics belong to its weights: a batch of other images would normalise otherwise than the layers behind have
    learnt. One without parameters is held if its statistics fit a pattern. Raises UserError for a pattern that fits
    nothing, and where nothing is left to train.
    """
    weights = named_weights(classifier)
    if not which:
        return
    if which == "all_but_head":
        top = {id(param) for param in head(classifier)[1].parameters()}
        frozen = [name for name, param in weights.items() if id(param) not in top]
        patterns: Sequence[str] = ["*"]
    else:
        patterns = [which] if isinstance(which, str) else which
        statistics = [name for name, _ in classifier.network.named_buffers() if name.endswith(".running_mean")]
        frozen = [name for pattern in patterns for name in matching([*weights, *statistics], pattern, KEY)]
    for name in frozen:
        if name in weights:
            weights[name].requires_grad_(False)
    if not any(param.requires_grad for param in weights.values()):
        raise UserError(f"{KEY} = {which}: leaves nothing to train; give fewer patterns, or all_but_head")
    classifier.held = tuple(
        name for name, child in classifier.network.named_modules() if _is_frozen_norm(name, child, patterns)
    )
    classifier.train(classifier.training)


def _is_frozen_norm(name: str, child: nn.Module, patterns: Sequence[str]) -> bool:
    if not isinstance(child, nn.modules.batchnorm._BatchNorm):
        return False
    own = list(child.parameters(recurse=False))
    if own:
        return not any(param.requires_grad for param in own)
    return any(fnmatchcase(f"{name}.running_mean", pattern) for pattern in patterns)
