"""`esam-dist report RUN...`: writes the page and prints the summary."""

from __future__ import annotations

import argparse
import logging
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from esam_dist.errors import UserError
from esam_dist.files import write_file
from esam_dist.report import groups, page, runs

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist report` on `parser`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; seeds are grouped")
    parser.add_argument("--out", type=Path, help="HTML file (default: report.html in the first run's folder)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write it again and again (default: every 30 s), until Ctrl-C; the page renews itself in a browser",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist report`; folders without a run are passed over.

    Raises UserError where none holds a run, or the page cannot be written.
    """
    if args.watch is not None and not 1.0 <= args.watch <= 86400.0:
        raise UserError(f"--watch {args.watch:g}: give a number of seconds, 1 or more")
    shown, passed_over, out = _write(args, args.watch or 0.0)
    for line in passed_over:
        log.warning("passed over: %s", line)
    print(summary(shown))  # noqa: T201
    print(f"written to {out}", flush=True)  # noqa: T201
    try:
        while args.watch is not None:
            time.sleep(args.watch)
            _write(args, args.watch)
    except KeyboardInterrupt:
        _write(args, 0.0)  # what stays does not renew itself
    return 0


def _write(args: argparse.Namespace, renew_seconds: float) -> tuple[list[runs.Group], list[str], Path]:
    """Read the runs and write the page: its groups, what was passed over, and where it is."""
    found, passed_over = runs.read_all(args.runs)
    shown = runs.group(found)
    out: Path = args.out or found[0].folder / "report.html"
    try:
        write_file(out, page.page(shown, passed_over, renew_seconds=renew_seconds))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give the path of a file") from None
    return shown, passed_over, out


def summary(shown: list[runs.Group]) -> str:
    """The summary as a table for the terminal, and the differences where there are several groups."""
    tables = [[groups.columns(shown), *groups.rows(shown)]]
    if lines := groups.difference_table(shown):
        tables.append([["Difference", "Last accuracy", "0 outside the interval"], *lines])
    return "\n\n".join(map(in_columns, tables))


def in_columns(table: Sequence[Sequence[str]]) -> str:
    """Rows of words, each column as wide as its widest."""
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(word + " " * (width - _width(word)) for word, width in zip(words, widths, strict=True)).rstrip()
        for words in table
    )


def _width(text: str) -> int:
    """Columns of a terminal: two for a wide character, none for an accent of its own."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
