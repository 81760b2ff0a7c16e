"""YAML as a configuration needs it: small, shallow, without surprises; whatever is wrong is one line.

A scalar without quotes is what YAML 1.2's core schema says: `5e-2` and `1e5` are numbers, `1:30` and `2020-01-01` text.
Of YAML 1.1 only yes, no, on and off are kept, for true and false. Refused, for it would not be read as it was meant: a
key given twice, an integer with a leading zero, or of more than 64 bits. Refused, for a configuration needs none:
anchors, aliases, tags, keys that are lists, a second document, control characters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from esam_dist.config.secrets import shown
from esam_dist.errors import UserError, printable

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
NULL = re.compile(r"(?:~|null|Null|NULL)?")
TRUE = re.compile(r"true|True|TRUE|yes|Yes|YES|on|On|ON")
FALSE = re.compile(r"false|False|FALSE|no|No|NO|off|Off|OFF")
INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
CLOSED = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def read(path: Path, source: str) -> Any:
    """The value that the file at `path` holds, as `parse` gives it. Raises UserError also where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    return parse(content, source)


def parse(content: bytes, source: str) -> Any:
    """The value that `content` holds, None when it is empty. Raises UserError: a line that begins with `source`."""
    return _Reader(content, source).document()


def dump(values: Any) -> str:
    """`values` as YAML, which `parse` and readers of YAML 1.1 alike read back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def flow(value: Any) -> str:
    """`value` in one line, as it may stand behind a key."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """Puts quotes also around text that only `parse` would take for a number; writes no aliases."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


for _kind, _form in {"int": INTEGER, "float": FLOAT}.items():
    _whole = re.compile(f"(?:{_form.pattern})\\Z")
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _whole, [*"-+.0123456789"])


class _Reader:
    """Reads event by event, so that nothing is built that is refused."""

    def __init__(self, content: bytes, source: str) -> None:
        self._source = source
        self._has_lines = b"\n" in content.strip() and len(content) <= MAX_BYTES
        if len(content) > MAX_BYTES:
            self._refuse(1, f"is longer than {MAX_BYTES} bytes; give only keys whose values are not the defaults")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(content.count(b"\n", 0, error.start) + 1, "is not UTF-8; save it in that encoding")
        self._check_characters(text, 1)
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> Any:
        """The value of the only document."""
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), 1)
        self._next()
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(_line(event), "a second document begins; give one only")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        self._check_plain(event)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if depth > MAX_DEPTH:
            self._refuse(_line(event), f"is nested more than {MAX_DEPTH} deep; no key needs that")
        return self._mapping(depth) if isinstance(event, yaml.MappingStartEvent) else self._sequence(depth)

    def _sequence(self, depth: int) -> list[Any]:
        values = []
        while not isinstance(event := self._next(), CLOSED):
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self._next(), CLOSED):
            key = self._key(event)
            if key in values:
                first = f", first in line {lines[key]}" if self._has_lines else ""
                self._refuse(_line(event), f"key {shown(key)} is given twice{first}; remove one")
            lines[key] = _line(event)
            values[key] = self._value(self._next(), depth + 1)
        return values

    def _key(self, event: Any) -> str:
        """A key is text as it stands: `on` is no boolean."""
        self._check_plain(event)
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(_line(event), "a key is a list or a mapping; keys are words, such as 'epochs'")
        if event.value == "<<" and event.implicit[0]:
            self._refuse(_line(event), "merges (<<) are not read; write the values out")
        self._check_characters(event.value, _line(event))
        return event.value

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        self._check_characters(text, _line(event))
        if not event.implicit[0]:
            return text
        for form, value in ((NULL, None), (TRUE, True), (FALSE, False)):
            if form.fullmatch(text):
                return value
        if INTEGER.fullmatch(text):
            return self._integer(text, _line(event))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if FLOAT.fullmatch(text) else text

    def _integer(self, text: str, line: int) -> int:
        if LEADING_ZERO.fullmatch(text):
            self._refuse(line, f"{text[:20]} begins with 0; write a number without it, and text in quotes")
        if len(text) > 20 or not -(2**63) <= int(text, 0) < 2**63:
            self._refuse(line, f"{text[:20]}... is an integer of more than 64 bits; write less, or text in quotes")
        return int(text, 0)

    def _check_plain(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse(_line(event), "anchors (&name) and aliases (*name) are not read; write the value out")
        if event.tag is not None:
            self._refuse(_line(event), "tags (!name) are not read; write the value without one, and text in quotes")

    def _check_characters(self, text: str, first_line: int) -> None:
        found = CONTROL.search(text)
        if found:
            line = first_line + text.count("\n", 0, found.start())
            self._refuse(line, f"holds the control character {found[0]!a}; remove it")

    def _next(self) -> Any:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            # Not the error's own text, which quotes the line at fault: there may be a password in it.
            problem = re.sub(r"'[^']{25,}'", "'...'", printable(error.problem or "cannot be read"))
            self._refuse(mark.line + 1 if mark else 1, f"not a YAML value ({problem}); put text in quotes")
        except (ValueError, OverflowError):
            self._refuse(1, "not a YAML value (an escape or a version is no valid number); put text in single quotes")

    def _refuse(self, line: int, fault: str) -> NoReturn:
        raise UserError(f"{self._source}{f', line {line}' if self._has_lines else ''}: {fault}") from None


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
