"""A network by its name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torchvision
from torch import nn

from esam_dist.errors import UserError
from esam_dist.models.cifar_resnet import cifar_resnet8, cifar_resnet18, cifar_resnet20
from esam_dist.models.pyramidnet import pyramidnet110, pyramidnet110_a48, pyramidnet110_a84
from esam_dist.models.vit import vit_s_16
from esam_dist.models.wide_resnet import wrn16_4, wrn28_10

OURS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet8": cifar_resnet8,
    "cifar_resnet18": cifar_resnet18,
    "cifar_resnet20": cifar_resnet20,
    "wrn16_4": wrn16_4,
    "wrn28_10": wrn28_10,
    "pyramidnet110": pyramidnet110,
    "pyramidnet110_a48": pyramidnet110_a48,
    "pyramidnet110_a84": pyramidnet110_a84,
    "vit_s_16": vit_s_16,
}
TIMM = "timm/"
"""With this in front a name is one of timm's."""
# Networks with auxiliary heads return something other than logits.
AUXILIARY = ("googlenet", "inception_v3")


def model_names() -> list[str]:
    """Every name that `build_model` knows, ours first; without timm's, which are a thousand more."""
    return [*OURS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The network `name` with `num_classes` outputs, freshly initialised from torch's generator.

    `options` are the builder's own. Raises UserError, naming the nearest names, for a name or an option that is
    unknown, and for a value of an option that the builder refuses.
    """
    build, options = _builder(name, num_classes), dict(options or {})
    if not options:
        return build()
    own = next((key for key in ("num_classes", "weights", "pretrained") if key in options), None)
    if own is not None:
        key = "model.num_classes" if own == "num_classes" else "model.weights"
        raise UserError(f"model.options = {options}: {own} has a key of its own; set {key}")
    try:
        model = build(**options)
    except Exception as error:  # whatever a builder makes of what it does not know
        raise UserError(_refused(name, options, error)) from None
    takes = inspect.signature(type(model)).parameters
    # Some builders take whatever they are told, and pass over it.
    passed_over = [key for key in options if key not in takes and not name.startswith(TIMM) and name not in OURS]
    if passed_over:
        raise UserError(_unknown(name, passed_over[0], _settable(takes)))
    return model


def expression(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> str:
    """The network `name` in Python, for whoever has its weights: without this package, but for networks of ours."""
    told = "".join(f", {key}={value!r}" for key, value in (_extra(name) | dict(options or {})).items())
    if name in OURS:
        return f"esam_dist.models.build_model({name!r}, {num_classes})"
    if name.startswith(TIMM):
        return f"timm.create_model({name.removeprefix(TIMM)!r}, num_classes={num_classes}{told})"
    return f"torchvision.models.get_model({name!r}, weights=None, num_classes={num_classes}{told})"


def _extra(name: str) -> dict[str, Any]:
    return {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}


def _builder(name: str, num_classes: int) -> Callable[..., nn.Module]:
    if name.startswith(TIMM):
        return _timm_builder(name.removeprefix(TIMM), num_classes)
    if name in OURS:
        return lambda **options: OURS[name](num_classes, **options)
    if name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=3, cutoff=0.4) or ["resnet50"]
        raise UserError(f"model.name = {name!r} is unknown; did you mean {', '.join(near)}?")
    get: Callable[..., nn.Module] = torchvision.models.get_model
    return lambda **options: get(name, **{"weights": None, "num_classes": num_classes} | _extra(name) | options)


def _timm_builder(name: str, num_classes: int) -> Callable[..., nn.Module]:
    timm = imported_timm(name)
    try:
        known = timm.is_model(name.partition(".")[0])
    except (RuntimeError, ValueError):
        known = False
    if not known:
        names = timm.list_models()
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or ["resnet50"]
        raise UserError(
            f"model.name = {TIMM + name!r} is unknown to timm {timm.__version__}; did you mean "
            f"{', '.join(TIMM + other for other in near)}?"
        )
    return lambda **options: timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


def imported_timm(name: str) -> Any:
    """timm. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError(f"model.name = {TIMM + name} needs timm: pip install timm (or 'esam-dist[timm]')") from None
    return timm


def _refused(name: str, options: Mapping[str, Any], error: Exception) -> str:
    """Why a builder does not take `options`, in one line."""
    unknown = re.search(r"(?:(\w+)\.__init__|(\w+))\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown is None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"model.options = {dict(options)}: {name} refuses them ({reason}); correct them or leave them out"
    kind, function, key = unknown.groups()
    return _unknown(name, key, _parameters(error, kind or function))


def _unknown(name: str, key: str, takes: list[str]) -> str:
    near = difflib.get_close_matches(key, takes, n=1) or takes
    hint = f"; it takes {', '.join(near)}" if near else "; leave it out"
    return f"model.options: {name} takes no {key!r}{hint}"


def _parameters(error: Exception, name: str) -> list[str]:
    """What the class or function called `name` can be told, where the error's traceback leads to it."""
    place = error.__traceback__
    while place is not None:
        found = place.tb_frame.f_globals.get(name)
        if callable(found):
            return _settable(inspect.signature(found).parameters)
        place = place.tb_next
    return []


def _settable(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those that a configuration could hold: with a default that is a plain value."""
    return [
        name
        for name, each in parameters.items()
        if isinstance(each.default, bool | int | float | str) and name not in ("num_classes", "weights", "progress")
    ]
