"""`esam-dist recipes [NAME]`: the configurations that come with the program."""

from __future__ import annotations

import argparse
import difflib
from importlib import resources
from pathlib import Path

from esam_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist recipes` on `parser`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one, to begin from: NAME > my.yaml")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist recipes`. Raises UserError for a name that is none."""
    found = {path.stem: path for path in sorted(folder().glob("*.yaml"))}
    if args.name is None:
        width = max(map(len, found))
        for name, path in found.items():
            print(f"{name.ljust(width)}  {title(path)}")  # noqa: T201
        print("\nPrint one, to begin from: esam-dist recipes NAME > my.yaml")  # noqa: T201
        return 0
    name = Path(args.name).name.removesuffix(".yaml")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or list(found)
        raise UserError(f"recipe {args.name!r}: there is none; did you mean {', '.join(near)}?")
    print(found[name].read_text(encoding="utf-8"), end="")  # noqa: T201
    return 0


def folder() -> Path:
    """The folder of recipes: in a wheel it lies within this package, in a source tree it is configs/."""
    package = Path(str(resources.files("esam_dist.guide")))
    installed = package / "files"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def title(path: Path) -> str:
    """The first line of a recipe, which says what it trains."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
