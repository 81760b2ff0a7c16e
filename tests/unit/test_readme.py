"""What the README says of keys, commands and files is true. `python -m tests.unit.test_readme` rewrites its table."""

import re
import shlex
from pathlib import Path

import pytest

from esam_dist import config
from esam_dist.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "a test compares it -->\n", "<!-- end of keys -->"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md")]


def table():
    """The keys as a table, in the order of the config."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, (default, text) in config.keys().items():
        meaning = " ".join(text.split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(rows) + "\n"


def commands():
    """Every `esam-dist ...` and `-m esam_dist ...` in the README's blocks, as arguments."""
    for block in re.findall(r"^```\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            _, found, arguments = re.sub(r"(-m|--module) esam_dist ", "esam-dist ", line).partition("esam-dist ")
            if found:
                yield shlex.split(arguments, comments=True)


def test_table_of_keys_is_that_of_the_config():
    _, _, rest = README.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(), "run `python -m tests.unit.test_readme`"


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_every_command_of_the_readme_is_understood(arguments):
    args = _parser().parse_args(arguments)
    if arguments[0] == "train":
        config.load(ROOT / args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


if __name__ == "__main__":
    before, begin, rest = README.read_text().partition(BEGIN)
    README.write_text(before + begin + table() + END + rest.partition(END)[2])
