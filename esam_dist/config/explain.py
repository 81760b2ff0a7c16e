"""`--config-help KEY`: what a key means, what it takes, and what it is where nobody says anything."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esam_dist.config import strict_yaml
from esam_dist.config.read import Key, keys
from esam_dist.config.secrets import shown
from esam_dist.config.sections import Config
from esam_dist.errors import UserError
from esam_dist.methods import METHODS
from esam_dist.wording import takes

WIDTH = 78


class ConfigHelp(argparse.Action):
    """`--config-help KEY`: explains and ends, whatever else the command line lacks."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """See `argparse.Action`. Raises UserError for what is no key."""
        print(explain(str(values)), end="")  # noqa: T201
        parser.exit()


def add_config_help(parser: argparse.ArgumentParser) -> None:
    """Declare `--config-help KEY` on `parser`."""
    text = "explain a key (optim.lr, lr) or a section (optim), and end"
    parser.add_argument("--config-help", action=ConfigHelp, metavar="KEY", help=text)


def explain(wanted: str) -> str:
    """The paragraphs on a key, `section.key` or `key` alone, or on a section. Raises UserError for what is neither."""
    known = keys()
    found = [key for key in known if wanted in (key.name, key.name.partition(".")[2], key.name.partition(".")[0])]
    if not found:
        names = list(dict.fromkeys(word for key in known for word in (key.name, *key.name.split("."))))
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or list(Config.model_fields)
        raise UserError(f"--config-help {shown(wanted)}: is no key and no section; did you mean {', '.join(near)}?")
    text = "\n".join("\n".join(_paragraph(key)) + "\n" for key in found)
    if wanted in Config.model_fields:
        # The section's own sentence; a method has one in its file.
        kind = type(getattr(Config(), wanted))
        title = "Who trains, and how." if wanted == "method" else (kind.__doc__ or "").partition("\n")[0]
        return f"{wanted}: {title}\n\n{text}"
    return text


def _paragraph(key: Key) -> Iterator[str]:
    section, _, name = key.name.partition(".")
    kind = METHODS[(key.methods or ("esam",))[0]] if section == "method" else type(getattr(Config(), section))
    field = kind.model_fields[name]
    default = getattr(field.default, "plain", lambda: field.default)()
    is_name = key.name == "method.name"
    of, names = ", ".join(key.methods), ", ".join(METHODS)
    yield f"{key.name}  ({of})" if of else key.name
    yield f"  takes    {f'one of {names}' if is_name else takes(field)}"
    yield f"  default  {key.default if is_name else _as_yaml(default)}"
    for line in textwrap.wrap(key.description.replace("`", ""), WIDTH, break_on_hyphens=False):
        yield f"  {line}"


def _as_yaml(value: Any) -> str:
    if value is None or value == "":
        return "nothing"
    return str(value) if isinstance(value, str | Path) else strict_yaml.flow(value)
