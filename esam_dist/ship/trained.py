"""The weights of a run or of one of its checkpoints, with what must be known of them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from esam_dist.checkpoint import Checkpoints
from esam_dist.errors import UserError
from esam_dist.metrics.jsonl import read as read_rows
from esam_dist.models import build_model
from esam_dist.network import builder_options
from esam_dist.resume import STEP_NAME, averaged_weights, choose, is_checkpoint, named, no_run, run_config
from esam_dist.ship.card import Card, described_later, parse
from esam_dist.soundness import State

PREFIX = "network."
"""What the classifier that is trained puts before the names of the network's own weights."""


@dataclass(frozen=True)
class Trained:
    """Weights by the names that the plain network gives them, and where they come from."""

    card: Card
    weights: dict[str, Tensor]
    checkpoint: Path
    step: int
    averaged: bool
    accuracy: float | None
    """On the validation set; None where these weights were not validated."""

    @property
    def run(self) -> Path:
        """The run's folder; where the checkpoint was put elsewhere, the folder in which it lies."""
        within = self.checkpoint.parent
        within = within if within.name else within.absolute()
        return within.parent if within.name == "checkpoints" else within

    def network(self) -> nn.Module:
        """The plain network with the weights, for evaluation. Raises UserError where they are of another one."""
        return filled(self.card, self.weights, f"checkpoint {self.checkpoint}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare on `parser` which weights of a run are meant."""
    parser.add_argument("--averaged", action="store_true", help="the averaged weights (train.average)")
    parser.add_argument("--checkpoint", help="best (default), newest, a step's name or number, or a path")


def find(where: Path, args: argparse.Namespace, key: str = "RUN") -> Trained:
    """The weights that the user means by a run's or checkpoint's folder and the options of `add_arguments`.

    `key` is what the command line calls the folder. Raises UserError where there are none, or they are broken.
    """
    path, state = _found(where, args.checkpoint, key)
    model: dict[str, Tensor] = averaged_weights(path, state) if args.averaged else state["engine"]["model"]
    weights = {name.removeprefix(PREFIX): value.contiguous() for name, value in model.items()}
    step = state["train"]["step"]
    accuracy = _averaged_accuracy(path, step) if args.averaged else _accuracy(path)
    return Trained(_card(path, state, weights), weights, path, step, args.averaged, accuracy)


def filled(card: Card, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The plain network of `card` with `weights`, for evaluation. Raises UserError where they do not go together."""
    network = build_model(card.model, card.num_outputs, card.options)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise UserError(f"{source}: its weights are not those of {card.model} ({first[:200]}); use another") from None
    return network.requires_grad_(False).eval()


def check_alone(command: str) -> None:
    """Raise UserError under a launcher of several ranks: each would do the same work, and write the same file."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"esam-dist {command}: works in one process; start it without torchrun or deepspeed")


def _found(where: Path, wanted: str | None, key: str) -> tuple[Path, State]:
    if where.is_dir() and not is_checkpoint(where):
        if not (where / "checkpoints").is_dir():
            raise no_run(where, key)
        return choose(Checkpoints(where / "checkpoints", keep=1), wanted or "best")
    if wanted is not None:
        raise UserError(f"--checkpoint {wanted}: {where} is no run's folder; give only one of the two")
    if not where.exists() and STEP_NAME.fullmatch(where.name) is None:
        raise no_run(where, key)
    return named(str(where), where.parent, key)


def _card(path: Path, state: State, weights: Mapping[str, Tensor]) -> Card:
    if state.get("card"):
        return parse(state["card"], f"checkpoint {path}")
    run = _run_of(path)
    if run is None:
        raise UserError(
            f"checkpoint {path}: an earlier version wrote it, so that it does not say what it is of; put it back into "
            "the checkpoints/ of its run, where config.yaml does"
        )
    cfg = run_config(run)
    with torch.device("meta"):
        of_two = build_model(cfg.model.name, 2, builder_options(cfg)).state_dict()
    grown = [name for name, value in of_two.items() if name in weights and value.shape != weights[name].shape]
    return described_later(cfg, len(weights[grown[0]]) if grown else 2, path)


def _run_of(checkpoint: Path) -> Path | None:
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def _accuracy(path: Path) -> float | None:
    try:
        accuracy = json.loads((path / "metadata.json").read_bytes()).get("accuracy")
    except (OSError, ValueError):  # a run that goes on may have removed it in the meantime
        return None
    return accuracy if isinstance(accuracy, float) else None


def _averaged_accuracy(path: Path, step: int) -> float | None:
    """What the run's validation has measured at that step."""
    run = _run_of(path)
    rows = [] if run is None else read_rows(run)
    found = [row.get("averaged_accuracy") for row in rows if (row["kind"], row.get("step")) == ("validation", step)]
    return found[-1] if found and isinstance(found[-1], float) else None
