"""What looks like a password, token or signature; an error does not repeat it: errors stand in logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = re.compile(r"\$\{\w+\}|\$\w+")
# One blank at most stands between two words here (see `looks_secret`): so no pattern takes quadratic time over many.
NAME = (
    r"(?:signature|token|secret|password|passwd|credential|api[-_]?key|access[-_]?key|auth|authorization)"
    r"(?:s|[-_]\w{1,40})?['\"]?\s?[=:]\s?"
)
SCHEME = r"(?:basic|bearer|token)\b"
SECRETS = (
    r"://[^/@\s:]+@|://[^/@\s:]*:[^/@\s]+@",  # a user alone may be a token
    r"[?&]sig=[^&\s]",
    # In quotes, or as it is. Where a variable was, nothing is left before the next quote, blank or `&`.
    rf"{NAME}['\"](?:{SCHEME}\s)?(?!{SCHEME})[^\s&'\"]",
    rf"{NAME}(?!(?:{SCHEME})?[\s'\"]*(?:[&'\"]|$))[^\s&]",
    r"(?:^|\s)(?:-u|--user)[\s=]*['\"]?[^\s:'\"]*:[^\s'\"]",
)
LONGEST_SHOWN = 80
HIDDEN = "(not shown: it looks like a password, token or signature)"


def looks_secret(text: str) -> bool:
    """Whether `text` holds one of the usual forms; a variable, `${NAME}`, is none."""
    literal = re.sub(r"\s+", " ", VARIABLE.sub("", text))
    return any(re.search(form, literal, re.IGNORECASE) for form in SECRETS)


def shown(value: Any) -> str:
    """`value`, text or what YAML makes of it, as an error may repeat it: in quotes and cut; nothing of a secret."""
    # Also without quotes and brackets: a list of a command's words is a command.
    if looks_secret(str(value)) or looks_secret(" ".join(_leaves(value))):
        return HIDDEN
    return repr(str(value) if isinstance(value, Path) else value)[:LONGEST_SHOWN]


def shown_override(override: str) -> str:
    """The override `section.key=value` as an error may repeat it: of one that looks secret, at most its key."""
    if shown(override) != HIDDEN:
        return shown(override)
    key, equals, _ = override.partition("=")
    return f"{key}={HIDDEN}" if equals and re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", key) else HIDDEN


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from (str(key), *_leaves(entry))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield str(value)
