"""Where a run goes on from: its own newest checkpoint, or the one that `run.resume` names; and whether that fits it."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esam_dist import config
from esam_dist.averaging import averaged_model
from esam_dist.checkpoint import Checkpoints, read
from esam_dist.engine.keys import OptimKeys
from esam_dist.errors import UserError
from esam_dist.soundness import State

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"(?:step_)?([0-9]{1,18})")
"""How a user may name a step: as its folder is called, or by its number."""


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
    """The checkpoint to evaluate: `best`, `newest` (sound), or what `named` knows. Raises UserError without one."""
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

    It is a checkpoint's folder; a run's folder, for its newest sound one; or a step's name or number: `RUN/step_N`,
    `RUN/N`, or without RUN one of those in `own`. Raises UserError where there is none, or it is broken.
    """
    path = Path(wanted)
    step = _of_step(path, own)
    if step is not None:
        return step, read(step)
    if path.name == "state.pt" and path.is_file():
        path = path.parent
    if path.is_file():
        raise UserError(f"{key} = {wanted}: {_a_file(wanted, key)}")
    if (path / "checkpoints").is_dir():
        found = Checkpoints(path / "checkpoints", keep=1).newest()
        if found is None:
            raise UserError(f"{key} = {wanted}: that run has no checkpoint; give another run or checkpoint")
        return found
    if not is_checkpoint(path):
        raise UserError(f"{key} = {wanted}: {_lack(path, own)}")
    return path, read(path)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has the parts of a checkpoint, broken or not."""
    return path.is_dir() and any((path / name).exists() for name in ("state.pt", "metadata.json"))


def take_weights(module: nn.Module, saved: tuple[Path, State], cfg: config.Config, *, averaged: bool) -> None:
    """Give `module` the weights, or their average, of the checkpoint that was found. Raises UserError."""
    path, state = saved
    check_network(path, state, cfg, module)
    module.load_state_dict(averaged_weights(path, state) if averaged else state["engine"]["model"])


def averaged_weights(path: Path, state: State) -> dict[str, Tensor]:
    """The averaged weights of the checkpoint at `path`. Raises UserError where it holds none."""
    if not state.get("average"):
        raise UserError(f"checkpoint {path}: holds no average; train with train.average = ema, or leave out --averaged")
    return averaged_model(state["engine"]["model"], state["average"])


def run_config(folder: Path, overrides: list[str] | None = None) -> config.Config:
    """The configuration of the run in `folder`, changed by `overrides`. Raises UserError where there is no run."""
    if not (folder / "config.yaml").exists():
        raise no_run(folder)
    return config.load(folder / "config.yaml", overrides)


def no_run(folder: Path, key: str = "RUN") -> UserError:
    """The error that `folder`, the value of `key`, is not that of a run, and which one may be meant."""
    if is_checkpoint(folder):
        return UserError(
            f"{key} = {folder}: is a checkpoint; give the folder of its run, {folder.parent.parent}, and "
            f"--checkpoint {folder.name}"
        )
    lack = "holds no config.yaml, so it is no run's folder" if folder.exists() else "no such folder"
    beside = {path.parent.name: path.parent for path in folder.absolute().parent.glob("*/config.yaml")}
    near = difflib.get_close_matches(folder.name, beside, n=1) or sorted(beside)[:3]
    hint = f" (there are {', '.join(str(folder.parent / name) for name in near)})" if near else ""
    return UserError(f"{key} = {folder}: {lack}; give the run.folder that was trained in{hint}")


def check_network(path: Path, state: State, cfg: config.Config, module: nn.Module) -> None:
    """Raise UserError for a checkpoint of another network, or of another number of classes."""
    wanted, saved = _kinds(module.state_dict()), _kinds(state["engine"]["model"])
    if saved == wanted:
        return
    remedy = (
        f"use the configuration that it was trained with; or, to begin from its weights, a new run.folder with "
        f"model.weights={path} in place of run.resume"
    )
    first = next(name for name in [*wanted, *saved] if saved.get(name) != wanted.get(name))
    if saved.keys() == wanted.keys():
        raise UserError(
            f"checkpoint {path}: holds another network than model.name = {cfg.model.name} with these classes ({first} "
            f"is {_words(saved[first])}, not {_words(wanted[first])}); {remedy}"
        )
    raise UserError(
        f"checkpoint {path}: holds another network than model.name = {cfg.model.name} ({first} is "
        f"{'missing' if first in wanted else 'unknown'}); {remedy}"
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
        entry = saved.get(name, {}) if param.requires_grad else {}
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
            f"checkpoint {path}: what its method remembers, or its average of the weights, is of another network, or "
            "other weights were frozen when it was trained; use the model.freeze of that run, or begin from its "
            f"weights alone: model.weights = {path} in place of run.resume"
        )


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    """Its shape, and whether it holds fractions."""
    return tensor.shape, tensor.is_floating_point()


def _words(kind: tuple[torch.Size, bool]) -> str:
    return f"{list(kind[0])}{'' if kind[1] else ' of whole numbers'}"


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


def _of_step(path: Path, own: Path) -> Path | None:
    """The checkpoint of the step that `path` names or numbers, of the run in which it says; None: there is none."""
    number = STEP_NAME.fullmatch(path.name)
    if number is None:
        return None
    # A name without a folder is one of our own, whatever lies in the working directory.
    within = [own] if path.name == str(path) else [path.parent / "checkpoints", path.parent]
    return next((steps[int(number[1])] for steps in map(_steps, within) if int(number[1]) in steps), None)


def _steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder`, by step."""
    return {int(path.name.rpartition("_")[2]): path for path in Checkpoints(folder, keep=1).all()}


def _a_file(wanted: str, key: str) -> str:
    remedy = "give the folder of a run or of a checkpoint"
    if key == "run.resume":
        remedy = f"to begin from the weights in a file, give model.weights={wanted} and leave run.resume out"
    return f"is a file, and a checkpoint is a folder; {remedy}"


def _lack(path: Path, own: Path) -> str:
    """Why no checkpoint was found, and what there is."""
    if (path / "config.yaml").exists():
        return "that run has no checkpoint; give another run or checkpoint"
    of_own = STEP_NAME.fullmatch(str(path)) is not None
    within = [own] if of_own else [path.parent / "checkpoints", path.parent]
    there = [step.name for steps in map(_steps, within) for step in steps.values()]
    if there:
        return f"no such checkpoint; there are {', '.join(there[-5:])}"
    if of_own:
        return f"{own} holds no checkpoint; give RUN/{path}, with the folder of a run"
    what = "is no checkpoint (it holds no state.pt)" if path.exists() else "no such checkpoint"
    return f"{what}; give the folder of a run or of a checkpoint, or RUN/step_N"
