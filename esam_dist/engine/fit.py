"""Whether a method, a model, its optimizer and the batches go together, where no configuration was checked before."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from esam_dist.engine.adopt import Adopted
from esam_dist.errors import UserError
from esam_dist.methods import Method, Setup
from esam_dist.ranks import Ranks

LEAST = {"accumulate": 1, "clip_grad_norm": 0, "seed": 0, "total_updates": 0, "updates_per_epoch": 0}


def refuse_options(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise UserError for an option that is not `known`, or whose value makes no sense."""
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            raise UserError(f"unknown option {key!r}; did you mean {(near or list(known))[0]!r}?")
        kind = float | int if key == "clip_grad_norm" else int
        if key in LEAST and (isinstance(value, bool) or not isinstance(value, kind) or not value >= LEAST[key]):
            what = "number" if key == "clip_grad_norm" else "whole number"
            raise UserError(f"{key} = {value!r} is refused: give a {what} >= {LEAST[key]}")
    autocast = options.get("autocast")
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise UserError(f"autocast = {autocast!r} is refused: give torch.bfloat16 or torch.float16, or leave it out")


def refuse_unknown_time(method: Method, options: Mapping[str, Any]) -> None:
    """Raise UserError for a phase or a schedule where nothing says how long the training or an epoch is."""
    for key, value in method:
        if key == "phase" and (value.from_, value.to) != (0.0, 1.0) and not options.get("total_updates"):
            raise UserError(f"method.{key} = {value.plain()} is a share of the training: give total_updates=N")
        if getattr(value, "changes", False) and not options.get("updates_per_epoch"):
            raise UserError(f"method.{key} = {value.plain()} changes with the epoch: give updates_per_epoch=N")


def refuse_network(method: Method, module: nn.Module, ranks: Ranks) -> None:
    """Raise UserError for a network whose backward pass is a collective, where ranks do not go through it alike."""
    synced = any(isinstance(child, nn.SyncBatchNorm) for child in module.modules())
    if synced and ranks.world_size > 1 and "part" in method.needs():
        raise UserError(
            "SyncBatchNorm waits for all ranks in its backward pass, and each rank draws weights of its own: use "
            "BatchNorm, or method.beta = 1 and method.swp = tensor"
        )


class Batches:
    """The batches of a training, whose sizes are not known before they come."""

    def __init__(self, method: Method, adopted: Adopted, ranks: Ranks) -> None:
        self._method, self._adopted, self._ranks = method, adopted, ranks
        self._num_groups = 0
        self._checked: set[int] = set()

    def check(self, size: int) -> None:
        """Called by all ranks with the size of each batch: what a size brings is looked at once."""
        if size in self._checked:
            return
        if not size:
            raise UserError("a batch of 0 samples: give each rank at least one")
        if not self._checked:
            self._settle(size)
        self._refuse_combination(size)
        if self._method.num_groups(size) != self._num_groups:
            raise UserError(
                f"a batch of {size} samples does not make the {self._num_groups} groups of the first one: give batches "
                "of one size (drop_last=True)"
            )
        self._checked.add(size)

    def _settle(self, size: int) -> None:
        """With the first batch: as many samples on every rank, and an update's micro-batches, one for each group."""
        sizes = self._ranks.gather_later(torch.tensor([size], device=self._ranks.device)).wait().flatten().tolist()
        if len(set(sizes)) > 1:
            raise UserError(f"batches of {sizes} samples on ranks 0, 1, ...: give every rank equally many")
        native, self._num_groups = self._adopted.native, self._method.num_groups(size)
        if native is not None:
            native.accumulate = self._adopted.accumulate * self._num_groups
        elif self._num_groups and self._adopted.accumulate % self._num_groups:
            raise UserError(
                f"method.group_size makes {self._num_groups} groups of a batch, each a micro-batch to DeepSpeed: set "
                f"gradient_accumulation_steps = {self._num_groups}, or a multiple, in its configuration"
            )

    def _refuse_combination(self, size: int) -> None:
        """The rules that a configuration is checked by."""
        groups = 1 if self._adopted.native is not None else max(1, self._num_groups)
        setup = Setup(size, self._adopted.accumulate // groups, self._adopted.momentum)
        for is_refused, reason in self._method.faults(setup):
            if is_refused:
                raise UserError(reason)
