"""Where a run goes on from: its own newest checkpoint, or the one that `run.resume` names; and whether that fits it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esam_dist import config
from esam_dist.checkpoint import STEP, Checkpoints, read
from esam_dist.engine.keys import OptimKeys
from esam_dist.errors import UserError
from esam_dist.soundness import State

logger = logging.getLogger(__name__)


def find_state(cfg: config.Config, checkpoints: Checkpoints, module: nn.Module) -> State | None:
    """The state that the run continues from; None for a new run.

    The path in `run.resume` is for a folder without checkpoints: a job that is started again by the same command goes
    on from its own. Raises UserError where there is no sound one, or it is of another network or optimizer.
    """
    if cfg.run.resume == "never":
        return None
    found = checkpoints.newest()
    if cfg.run.resume != "auto":
        if found is None:
            found = named(cfg.run.resume, checkpoints.folder, "run.resume")
        else:
            logger.warning(
                "run.resume = %s: passed over, as run.folder = %s has checkpoints of its own; to go back, choose "
                "another run.folder",
                *(cfg.run.resume, cfg.run.folder),
            )
    if found is None:
        return None
    path, state = found
    check_network(path, state, cfg, module)
    fit_optimizer(path, state, cfg, module)
    check_memory(path, state, module)
    logger.info("continuing from %s", path)
    return state


def choose(checkpoints: Checkpoints, wanted: str) -> tuple[Path, State]:
    """The checkpoint to evaluate: `best`, `newest` (sound), a step's name, or a path. Raises UserError without one."""
    if wanted == "newest":
        found = checkpoints.newest()
        if found is None:
            raise UserError(f"{checkpoints.folder}: holds no checkpoint; train first, or give --checkpoint PATH")
        return found
    if wanted != "best":
        return named(wanted, checkpoints.folder, "--checkpoint")
    if not checkpoints.all():
        raise UserError(f"{checkpoints.folder}: holds no checkpoint; train first, or give --checkpoint PATH")
    best = checkpoints.best()
    if best is None:
        raise UserError(f"{checkpoints.folder}: no checkpoint was validated; use --checkpoint newest")
    return best, read(best)


def named(wanted: str, own: Path, key: str) -> tuple[Path, State]:
    """The checkpoint that `wanted` names, the value of `key`.

    It is a checkpoint's folder; a run's folder, for its newest sound one; or `RUN/step_N`, where without RUN the
    checkpoints in `own` are meant. Raises UserError where there is none, or it is broken.
    """
    path = Path(wanted)
    if (path / "checkpoints").is_dir():
        found = Checkpoints(path / "checkpoints", keep=1).newest()
        if found is None:
            raise UserError(f"{key} = {wanted}: that run has no checkpoint; give another run or checkpoint")
        return found
    if STEP.fullmatch(path.name) and not path.exists():
        within = own if path.name == wanted else path.parent / "checkpoints"
        if (within / path.name).exists():
            path = within / path.name
    return path, read(path)


def check_network(path: Path, state: State, cfg: config.Config, module: nn.Module) -> None:
    """Raise UserError for a checkpoint of another network."""
    if _kinds(state["engine"]["model"]) != _kinds(module.state_dict()):
        raise UserError(
            f"checkpoint {path}: holds another network than model.name = {cfg.model.name} with these classes; "
            "use the configuration that it was trained with"
        )


def fit_optimizer(path: Path, state: State, cfg: config.Config, module: nn.Module) -> None:
    """Bring the optimizer's state into the form that every engine takes: an entry for each trainable parameter.

    SGD's momentum may be missing, which is a momentum of zero; it is dropped where none is asked for. Raises UserError
    for a checkpoint of another optimizer.
    """
    saved: dict[str, dict[str, Any]] = state["engine"]["optimizer"]
    wanted = _kept_by(cfg.optim)
    fitted: dict[str, dict[str, Any]] = {}
    for name, param in module.named_parameters():
        entry = saved.get(name, {})
        if cfg.optim.name == "sgd":
            entry = {key: value for key, value in entry.items() if key != "momentum_buffer" or key in wanted}
        # AdamW's number of updates is one.
        misshapen = any(
            _kind(value) != (torch.Size() if key == "step" else param.shape, True) for key, value in entry.items()
        )
        if entry and (entry.keys() != wanted or misshapen):
            raise UserError(_another_optimizer(path, entry, cfg))
        fitted[name] = entry
    if cfg.optim.name == "adamw" and state["train"]["step"] and not any(fitted.values()):
        raise UserError(_another_optimizer(path, {}, cfg))
    # The native engine has no entry for a parameter that was never updated; ZeRO asks for all, and the first for
    # the number of updates.
    native = cfg.engine.name == "native"
    updated_first = sorted(fitted.items(), key=lambda item: not item[1])
    state["engine"]["optimizer"] = {name: entry for name, entry in updated_first if entry or not native}


def check_memory(path: Path, state: State, module: nn.Module) -> None:
    """Raise UserError where what the method remembers, or the average, is of other weights than those of `module`."""
    trained = {name: _kind(param) for name, param in module.named_parameters() if param.requires_grad}
    buffers = {name: _kind(buffer) for name, buffer in module.named_buffers()}
    average = state.get("average", {})
    remembered = state.get("method", {}).values()
    alike = all([_kind(tensor) for tensor in vector] == [*trained.values()] for vector in remembered)
    alike &= all(_kinds(copy) == trained for copy in average.get("copies", []))
    statistics = _kinds(average.get("statistics", {}))
    alike &= all(buffers.get(name) == kind for name, kind in statistics.items())
    if not alike:
        raise UserError(
            f"checkpoint {path}: what its method remembers, or its average of the weights, is of another network; use "
            "another checkpoint"
        )


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    """Its shape, and whether it holds fractions."""
    return tensor.shape, tensor.is_floating_point()


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, bool]]:
    return {name: _kind(tensor) for name, tensor in tensors.items()}


def _kept_by(optim: OptimKeys) -> set[str]:
    if optim.name == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if optim.momentum else set()


def _another_optimizer(path: Path, entry: dict[str, Any], cfg: config.Config) -> str:
    holds = ", ".join(sorted(entry)) or "nothing of AdamW"
    return (
        f"checkpoint {path}: holds the state of another optimizer ({holds}) than optim.name = {cfg.optim.name}; "
        "use the configuration that it was trained with"
    )
