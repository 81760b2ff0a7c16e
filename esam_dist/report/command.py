"""`esam-dist report RUN...`: writes the page and prints the summary."""

from __future__ import annotations

import argparse
from pathlib import Path

from esam_dist.errors import UserError
from esam_dist.report import page, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist report` on `parser`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; seeds are grouped")
    parser.add_argument("--out", type=Path, help="HTML file (default: report.html in the first run's folder)")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist report`. Raises UserError for a folder without a run, or a page that cannot be written."""
    groups = runs.group([runs.read(folder) for folder in args.runs])
    out: Path = args.out or args.runs[0] / "report.html"
    try:
        out.write_text(page.page(groups), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give the path of a file") from None
    print(summary(groups))  # noqa: T201
    print(f"written to {out}")  # noqa: T201
    return 0


def summary(groups: list[runs.Group]) -> str:
    """The summary as a table for the terminal."""
    return in_columns([list(page.COLUMNS), *page.rows(groups)])


def in_columns(table: list[list[str]]) -> str:
    """Rows of words, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)).rstrip() for words in table
    )
