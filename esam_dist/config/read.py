"""From a YAML file and overrides to a checked `Config`, and back."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from esam_dist.config import combinations
from esam_dist.config.sections import Config
from esam_dist.errors import UserError


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides in order, and check every value.

    Raises UserError when the file cannot be read, an override has another form, or a key or value is refused.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: must hold sections such as 'train:', not {type(values).__name__}")
    for override in overrides or []:
        _apply(values, override)
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str) -> Config:
    """Check plain `values`, named `source` in errors, against the sections. Raises UserError for the first fault."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_fault(error, source)) from None
    combinations.check(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `parse(yaml.safe_load(dump(c)))` equals `c`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """Every value as `section.key`."""
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def keys() -> dict[str, tuple[str, str]]:
    """Every key as `section.key`, with its default and its one-paragraph description."""
    table = {}
    for section, field in Config.model_fields.items():
        for key, entry in type(field.default).model_fields.items():
            default = field.default.model_dump(mode="json")[key]
            table[f"{section}.{key}"] = ("" if default is None else str(default), entry.description or "")
    return table


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot or not section or not name or "." in name:
        raise UserError(f"override {override!r}: must have the form section.key=value, such as train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    current = values.setdefault(section, {})
    if current is None:
        current = values[section] = {}
    if not isinstance(current, dict):
        raise UserError(f"override {override!r}: {section!r} is not a section in the file")
    current[name] = value


def _first_fault(error: ValidationError, source: str) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"][:2])
    if fault["type"] == "extra_forbidden":
        known = list(keys()) if "." in where else list(Config.model_fields)
        near = difflib.get_close_matches(where, known, n=3, cutoff=0.5) or known[:3]
        return f"{source}: unknown key {where!r}; did you mean {', '.join(near)}?"
    value = fault["input"]
    shown = repr(str(value) if isinstance(value, Path) else value)
    return f"{source}: {where} = {shown[:80]} is refused: {fault['msg'].removeprefix('Value error, ')}"
