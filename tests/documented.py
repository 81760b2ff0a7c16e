"""The commands that pages tell: from their shell blocks, and from code within lines; and what makes one wrong.

A program that is none of ours is refused, unless a comment stands on the line before its block: that says which test
runs it, or why none does.

    <!-- run by tests/launch/test_slurm.py -->
    <!-- not run: needs a cluster -->
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from docs import tables
from esam_dist import config
from esam_dist.cli import _parsed
from esam_dist.errors import UserError

ROOT = tables.ROOT
BLOCK = re.compile(r"^((?:<!--[^\n]*-->\n+)?)(?: *)```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "shell", "console")
MARK = re.compile(r"<!-- (?:run by (?P<test>\S+)|not run: (?P<reason>.+)) -->")
INLINE = re.compile(r"(?<!`)`((?:esam-dist|make|python -m|pip install|torchrun|deepspeed) [^`\n]+)`(?!`)")
OURS = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+(=.*)?")
DIGITS = ROOT / "configs/digits_esam.yaml"
MADE = {"photos.yaml": ROOT / "configs/photographs.yaml"}
"""Configurations that `esam-dist init` writes on a page, and what they are alike to."""


class Command(NamedTuple):
    """One command of a page."""

    place: str
    words: list[str]
    mark: str
    """The comment before its block, or nothing."""
    is_whole: bool = True
    """Within a line a command may be told without what it is given, such as its folder."""


class WrongCommandError(Exception):
    """What a page tells cannot be done."""


def commands(name: str, text: str) -> Iterator[Command]:
    """Every command of the page `name`."""
    for found in BLOCK.finditer(text):
        mark, language, block = found.groups()
        if language in SHELL:
            line = text[: found.start()].count("\n") + 1
            for words in lines(block):
                yield Command(f"{name}:{line}", words, mark.strip())
    for found in INLINE.finditer(BLOCK.sub("", text)):
        # What may be left out, or is only hinted at, is no command yet.
        if not re.search(r"\.\.\.|\[|&", found[1]):
            yield Command(f"{name}: {found[1]}", shlex.split(found[1]), "", is_whole=False)


def lines(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, those of a pipe or a list apart."""
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        for word in lexer:
            if set(word) <= set("|&;"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def check(command: Command) -> None:
    """Raise WrongCommandError where `command` is none that can be run as it is told."""
    mark = MARK.fullmatch(command.mark)
    if command.mark and mark is None and "run" in command.mark:
        raise WrongCommandError(f"{command.mark}: neither `run by TEST` nor `not run: REASON`")
    if mark and mark["test"]:
        _check_test(mark["test"])
    words = [word for word in command.words if word != "..."]
    if not command.is_whole:
        words = _completed(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    words = words[: words.index(">")] if ">" in words else words
    program = {"python": _python, "python3": _python}.get(words[0]) or PROGRAMS.get(words[0])
    if program is not None:
        program(words[1:])
    elif mark is None:
        raise WrongCommandError(f"{words[0]} is no program of ours: say which test runs it, or why none does")


def _completed(words: list[str]) -> list[str]:
    """`words` with what is needed behind them, as far as they are none of ours' mistakes."""
    for added in ([], ["OUT"]):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            if words[0] == "esam-dist":
                _parsed([*_filled(words[1:]), *added])
            return [*words, *added]
    return words


def _filled(words: list[str]) -> list[str]:
    """A number for what stands for one: a single capital letter."""
    return [re.sub(r"^[A-Z]$", "1", word) for word in words if word != "key=value"]


def _check_test(name: str) -> None:
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file() or f"def {function}" not in (ROOT / path).read_text():
        raise WrongCommandError(f"there is no test {name}")


def _esam_dist(words: list[str]) -> None:
    """Parsed as the command line parses it; its configuration and its changes of keys as `config.load` takes them."""
    if len(words) == 1 and words[0] in _commands():
        return  # only named
    args = _parse(lambda: _parsed(_filled(words)))
    given: Path | None = getattr(args, "config", None)
    overrides: list[str] = getattr(args, "overrides", [])
    base = DIGITS if given is None or str(given).isupper() else MADE.get(str(given), ROOT / given)
    if not base.is_file():
        raise WrongCommandError(f"there is no {given}")
    if hasattr(args, "study") and not str(args.study).isupper() and not (ROOT / args.study).is_file():
        raise WrongCommandError(f"there is no {args.study}")
    filled = [word for word in overrides if not re.fullmatch(r"[A-Z]+|.*=[A-Z_]+", word)]
    try:
        config.load(base, filled)
    except UserError as error:
        raise WrongCommandError(str(error)) from None


def _commands() -> set[str]:
    # Each names itself where it is given nothing.
    told = _parse_help()
    return set(re.findall(r"^    (\w+)", told, re.MULTILINE))


def _parse_help() -> str:
    from esam_dist.cli import _parser

    return _parser().format_help()


def _python(words: list[str]) -> None:
    if words[:1] != ["-m"]:
        raise WrongCommandError("python without -m: name a module of ours")
    module, given = words[1], words[2:]
    if module == "esam_dist":
        _esam_dist(given)
    elif module == "pip":
        _pip(given)
    else:
        _module(module, given)


def _module(name: str, words: list[str]) -> None:
    """A module of ours that takes options, up to where it has parsed them."""
    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{name}.__main__")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT):
        raise WrongCommandError(f"there is no module {name}")
    if "ArgumentParser(" not in Path(spec.origin).read_text():
        if words:
            raise WrongCommandError(f"{name} takes no arguments")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: list[str] | None = None, _: object = None) -> None:
        parse(self, args)
        raise _EnoughError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(sys, "argv", [name, *words]),
        mock.patch.dict(sys.modules),
    ):
        # Another test may have imported it.
        sys.modules.pop(f"{name}.__main__", None)
        _parse(lambda: runpy.run_module(name, run_name="__main__"))


class _EnoughError(Exception):
    pass


def _parse(parse):
    """What `parse` returns; WrongCommandError where argparse ends the program."""
    try:
        return parse()
    except _EnoughError:
        return None
    except SystemExit as ended:
        if ended.code:
            raise WrongCommandError("its arguments are not understood; see above") from None
        return argparse.Namespace()


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = _parse(lambda: get_args_parser().parse_args(words))
    if not args.module or args.training_script != "esam_dist":
        raise WrongCommandError("torchrun without `-m esam_dist`")
    _esam_dist(args.training_script_args)


def _deepspeed(words: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    args = _parse(lambda: parse_args(words))
    if not args.module or args.user_script != "esam_dist":
        raise WrongCommandError("deepspeed without `--module esam_dist`")
    _esam_dist(args.user_args)


def _make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if unknown := {word for word in words if "=" not in word} - targets:
        raise WrongCommandError(f"the Makefile has no {min(unknown)}")


def _pip(words: list[str]) -> None:
    """What is installed is this package, by its folder or its name, with its extras; or what our constraints name."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    tested = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for word in words[1:]:
        if word in tested | {"--no-deps"}:
            continue
        found = re.fullmatch(r"(?:-e|--editable|\.|esam-dist|\.\[(.*)\]|esam-dist\[(.*)\])", word)
        if found is None:
            raise WrongCommandError(f"pip: {word} is neither this package nor among the constraints")
        if unknown := set((found[1] or found[2] or "").split(",")) - {"", *extras}:
            raise WrongCommandError(f"pip: there is no extra {min(unknown)}")


PROGRAMS = {
    "esam-dist": _esam_dist,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "make": _make,
    "pip": _pip,
}


def assert_wrong(text: str, told: str) -> None:
    """The first command of the page `text` is wrong, and the message says so."""
    (command, *_) = commands("page.md", text)
    with pytest.raises(WrongCommandError, match=told):
        check(command)
