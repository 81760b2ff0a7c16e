"""What a key takes, in words: for the help on a key, and for the error that refuses a value.

pydantic's own words speak of Python ("instance of TrainKeys"); a configuration file knows sections, numbers and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

WORDS = "words"
"""Key of a JSON schema that holds the words themselves, for a type that reads several forms."""
_BOUNDS = (
    (("minimum", "ge"), ">="),
    (("exclusiveMinimum", "gt"), ">"),
    (("maximum", "le"), "<="),
    (("exclusiveMaximum", "lt"), "<"),
)
_KINDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "nothing",
    "path": "a path",
    "string": "text",
}


def takes(field: FieldInfo) -> str:
    """What the values of `field` are: `a number >= 0 and < 1`, or `one of sgd, adamw`."""
    kind: Any = field.annotation
    annotated: Any = Annotated
    return _takes(annotated[(kind, *field.metadata)] if field.metadata else kind)


def refused(fault: ErrorDetails, field: FieldInfo | None) -> str:
    """Why pydantic refuses a value and what to give instead; `field` is the key's, None where it is not known."""
    words = fault["msg"]
    if fault["type"] == "value_error":  # our own validators' words
        return words.removeprefix("Value error, ")
    if fault["type"] == "string_pattern_mismatch":
        return f"give a name of the pattern {fault['ctx']['pattern']}"
    told = "a section, with keys of its own" if field is None else takes(field)
    return f"give {told}{', in quotes' if told == 'text' else ''}"


def field_at(kind: Any, place: Sequence[int | str]) -> FieldInfo | None:
    """The field of the model `kind` in which `place`, an error's, lies; None where there is none."""
    found: FieldInfo | None = None
    for part in place:
        kind = _inner(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = dict(kind.model_fields)
            fields |= {field.alias: field for field in kind.model_fields.values() if field.alias}
            if part not in fields:
                return found
            found = fields[str(part)]
            kind = found.annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
    return found


def _inner(kind: Any) -> Any:
    """A type without what is written around it."""
    return _inner(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def _takes(kind: Any) -> str:
    try:
        return in_words(TypeAdapter(kind).json_schema())
    except PydanticInvalidForJsonSchema:
        return "a value of its own kind"


def in_words(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if WORDS in schema:
        return str(schema[WORDS])
    if "enum" in schema or "const" in schema:
        choices = [str(choice) for choice in schema.get("enum", [schema.get("const")])]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if "anyOf" in schema:
        # A whole number is a number; what may be left empty says so last.
        kinds = sorted(schema["anyOf"], key=lambda each: each.get("type") == "null")
        told = list(dict.fromkeys(in_words(each) for each in kinds))
        if "a number" in told and "a whole number" in told:
            told.remove("a whole number")
        return ", or ".join(told) + _bounds(schema)
    kind = "path" if schema.get("format") == "path" else str(schema.get("type"))
    if kind in ("array", "object"):
        return _list(schema) if kind == "array" else _mapping(schema)
    return _KINDS.get(kind, "any value") + _bounds(schema)


def _mapping(schema: dict[str, Any]) -> str:
    names = ", ".join(f"{name}: ..." for name in schema.get("properties", {}))
    least = schema.get("minProperties")
    return f"{{{names or 'key: value, ...'}}}{f' of at least {least}' if least else ''}"


def _list(schema: dict[str, Any]) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    many = "" if least is None else f" of {least}" if least == most else f" of at least {least}"
    entry = in_words(schema["items"]) if schema.get("items") else ""
    return f"a list{many}{f', each {entry}' if entry else ''}"


def _bounds(schema: dict[str, Any]) -> str:
    told = [f"{sign} {_short(schema[name])}" for names, sign in _BOUNDS for name in names if name in schema]
    return f" {' and '.join(told)}" if told else ""


def _short(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
