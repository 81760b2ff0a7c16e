"""`esam-dist completion SHELL`: what a shell needs to complete commands and options, as a script."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import shtab

SHELLS = ("bash", "zsh", "fish")
HELP = """install it, here for bash, zsh and fish:
  esam-dist completion bash > ~/.local/share/bash-completion/completions/esam-dist
  esam-dist completion zsh > "${fpath[1]}/_esam-dist"
  esam-dist completion fish > ~/.config/fish/completions/esam-dist.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist completion` on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = HELP
    parser.add_argument("shell", choices=SHELLS, help="for which shell")


def run(args: argparse.Namespace, whole: Callable[[], argparse.ArgumentParser]) -> int:
    """Print the script; `whole` makes the parser of all commands."""
    parser = whole()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))  # noqa: T201
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let every argument that is a path be completed as one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_files(child)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
