"""From a YAML file and overrides to a checked `Config`, and back."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from esam_dist import wording
from esam_dist.config import combinations, strict_yaml
from esam_dist.config.secrets import shown, shown_override
from esam_dist.config.sections import Config
from esam_dist.errors import UserError, printable
from esam_dist.methods import METHODS

logger = logging.getLogger(__name__)

WORD = re.compile("[A-Za-z0-9_]+")
"""What sections and keys are made of."""


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides in order, and check every value.

    Raises UserError when the file cannot be read, an override has another form, or a key or value is refused.
    """
    source = f"config {printable(str(path))}"
    values = strict_yaml.read(path, source)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: must hold sections such as 'train:', not {type(values).__name__}")
    before = _method_name(values)
    for override in overrides or []:
        _apply(values, override)
    if before != _method_name(values):
        _drop_foreign(values, str(path), overrides or [], _method(before))
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str) -> Config:
    """Check plain `values`, named `source` in errors, against the sections. Raises UserError for the first fault."""
    # A section whose lines are all comments is one that says nothing.
    values = {name: {} if section is None else section for name, section in values.items()}
    if isinstance(values.get("method"), dict):
        values = values | {"method": {"name": _method_name(values), **values["method"]}}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(printable(_first_fault(error, source))) from None
    combinations.check(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML, which `load` reads back."""
    return strict_yaml.dump(config.model_dump(mode="json"))


def flat(config: Config) -> dict[str, Any]:
    """Every value as `section.key`."""
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


class Key(NamedTuple):
    """One key of the configuration."""

    name: str
    """`section.key`"""
    default: str
    description: str
    """One paragraph."""
    methods: tuple[str, ...] = ()
    """For a key of `method`, those that have it so; empty: all."""


def keys() -> list[Key]:
    """Every key, in the order of the sections; one of `method` for each meaning that it has."""
    found: dict[Key, tuple[str, ...]] = {}
    for section, field in Config.model_fields.items():
        kinds: dict[str, type[BaseModel]] = METHODS if section == "method" else {"": type(field.default)}  # type: ignore[assignment]
        for method, kind in kinds.items():
            for name, entry in kind.model_fields.items():
                default = Config().method.name if (section, name) == ("method", "name") else _plain(entry.default)
                text = METHOD_NAME if (section, name) == ("method", "name") else entry.description or ""
                key = Key(f"{section}.{name}", str(default), " ".join(text.split()))
                found[key] = (*found.get(key, ()), method)
    everyone = len(METHODS)
    return [
        key._replace(methods=methods if key.name.startswith("method.") and len(methods) < everyone else ())
        for key, methods in found.items()
    ]


METHOD_NAME = "Which method trains: " + ", ".join(f"`{name}`" for name in METHODS) + "; each has keys of its own."


def _plain(default: Any) -> Any:
    """A default as a config file would hold it."""
    if default is None:
        return ""
    return default.plain() if hasattr(default, "plain") else default


def _method_name(values: dict[str, Any]) -> Any:
    section = values.get("method")
    return section.get("name", Config().method.name) if isinstance(section, dict) else Config().method.name


def _method(name: Any) -> type[BaseModel] | None:
    """The method of that name; None for what is no name of one."""
    return METHODS.get(name) if isinstance(name, str) else None


def _drop_foreign(values: dict[str, Any], path: str, overrides: list[str], before: type[BaseModel] | None) -> None:
    """After an override of `method.name`: forget the file's keys that the new method does not have, and say so.

    A key that both have stays, and is named where the methods have other defaults: MSAM's rho is ten times SAM's.
    """
    kind = _method(_method_name(values))
    if kind is None:
        return
    given = {override.partition("=")[0] for override in overrides}
    known = {key for method in METHODS.values() for key in method.model_fields}
    section = values["method"]
    foreign = [key for key in section if key in known and key not in kind.model_fields and f"method.{key}" not in given]
    for key in foreign:
        del section[key]
    if os.environ.get("RANK", "0") != "0":
        return
    if foreign:
        logger.info(
            "method.name = %s has no %s: what %s says of it is left out", section["name"], ", ".join(foreign), path
        )
    fields = {} if before is None else before.model_fields
    for key in [key for key in section if key != "name" and key in fields and f"method.{key}" not in given]:
        default = kind.model_fields[key].default
        if default != fields[key].default:
            shown_default = default.plain() if hasattr(default, "plain") else default
            logger.warning(
                "method.%s = %s stays as %s has it; %s's default is %s",
                key,
                section[key],
                path,
                section["name"],
                shown_default,
            )


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    source = f"override {shown_override(override)}"
    if not equals or not dot or not WORD.fullmatch(section) or not WORD.fullmatch(name):
        raise UserError(f"{source}: must have the form section.key=value, such as train.epochs=5")
    # What is no UTF-8 on the command line is none in these bytes either, and refused.
    value = strict_yaml.parse(text.encode("utf-8", "surrogatepass"), source)
    current = values.setdefault(section, {})
    if current is None:
        current = values[section] = {}
    if not isinstance(current, dict):
        raise UserError(f"{source}: {section!r} is not a section in the file")
    current[name] = value


def _first_fault(error: ValidationError, source: str) -> str:
    fault = error.errors(include_url=False)[0]
    place = [str(part) for part in fault["loc"]] or ["?"]
    method = ""
    if place[0] == "method" and len(place) > 1 and place[1] in METHODS:
        # Behind the section comes the method by whose keys it was read.
        method = place.pop(1)
        if fault["type"] == "extra_forbidden" and len(place) == 2:
            return _foreign_key(place[1], method, source)
    where = ".".join(place[:2])
    if len(place) > 2 and fault["type"] in ("extra_forbidden", "missing"):
        what = "lacks the" if fault["type"] == "missing" else "has no"
        return f"{source}: {where} {what} key {shown(place[-1])}; see `esam-dist config --config-help {where}`"
    if place[1:2] == ["overrides"]:
        where = ".".join(place)
    if fault["type"] == "extra_forbidden":
        if where in ELSEWHERE:
            return f"{source}: unknown key {shown(where)}; {ELSEWHERE[where]} does it"
        return f"{source}: unknown key {shown(where)}; did you mean {', '.join(_nearest(where))}?"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found") and isinstance(fault["input"], dict):
        given = fault["input"].get("name")
        near = difflib.get_close_matches(str(given), METHODS, n=1) or ["esam"]
        return f"{source}: method.name = {shown(given)} is refused: give one of {', '.join(METHODS)}, such as {near[0]}"
    kind = METHODS[method] if method else type(getattr(Config(), place[0], None))
    field = wording.field_at(kind, place[1:])
    return f"{source}: {where} = {shown(fault['input'])} is refused: {wording.refused(fault, field)}"


ELSEWHERE = {
    **dict.fromkeys(("model.pretrained", "model.checkpoint", "model.init"), "model.weights (default, or a PATH)"),
    **dict.fromkeys(("train.pretrained", "train.weights", "run.weights"), "model.weights (default, or a PATH)"),
    **dict.fromkeys(("model.sync_bn", "train.sync_bn", "train.sync_batchnorm"), "model.sync_batchnorm"),
    **dict.fromkeys(("model.dropout", "model.stochastic_depth_prob", "model.drop_path"), "model.options"),
    **dict.fromkeys(("optim.learning_rate", "train.lr", "train.learning_rate"), "optim.lr"),
    **dict.fromkeys(("train.amp", "engine.precision", "engine.fp16", "engine.bf16"), "train.precision"),
    **dict.fromkeys(("train.batch_size", "optim.batch_size"), "data.batch_size"),
    **dict.fromkeys(("data.num_workers", "train.workers", "train.num_workers"), "data.workers"),
}
"""Names that others have for our keys, and for what is none of a section's own."""


def _nearest(where: str) -> list[str]:
    """Keys, or sections, that `where` may have been meant for: in its section, by the same name elsewhere, or alike."""
    section, _, name = where.partition(".")
    if not name:
        return difflib.get_close_matches(where, Config.model_fields, n=3, cutoff=0.5) or list(Config.model_fields)[:3]
    known = list(dict.fromkeys(key.name for key in keys()))
    own = [key for key in known if key.startswith(f"{section}.")]
    others = [key for key in known if key.partition(".")[2] == name]
    alike = difflib.get_close_matches(name, [key.partition(".")[2] for key in own], n=3, cutoff=0.6)
    return others + [f"{section}.{other}" for other in alike] or own[:8] or known[:3]


REPLACED = {
    "descent": "method.name = recycled (with method.exact = true for recycled_exact)",
    "start_epoch": "method.phase = {from: SHARE, to: 1}, in shares of the training",
    "late_share": "method.phase = {from: SHARE, to: 1}, in shares of the training",
}
"""Keys of earlier versions, and what does their work."""


def _foreign_key(key: str, method: str, source: str) -> str:
    """A key that the method does not have: whose it is, or what is meant."""
    owners = [name for name, kind in METHODS.items() if key in kind.model_fields]
    if owners:
        return (
            f"{source}: method.{key} is a key of method.name = {' | '.join(owners)}, not of {method}; remove it, or "
            "change method.name"
        )
    if key in REPLACED:
        return f"{source}: method.{key} is no more; remove it, or give {REPLACED[key]}"
    near = difflib.get_close_matches(key, METHODS[method].model_fields, n=3, cutoff=0.5) or ["name"]
    return f"{source}: unknown key 'method.{key}'; did you mean {', '.join(f'method.{name}' for name in near)}?"
