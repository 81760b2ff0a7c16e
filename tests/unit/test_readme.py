"""What the pages say of keys, costs, commands and files is true."""

import re
import shlex
from pathlib import Path

import pytest

from docs import tables
from esam_dist import config
from esam_dist.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = tables.pages()


def commands():
    """Every `esam-dist ...` and `-m esam_dist ...` in the blocks of the pages, as arguments."""
    text = "\n".join(page.read_text() for page in PAGES)
    # A block of a language, such as Python, begins otherwise; its end must not be taken for a beginning.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in [block for language, block in blocks if language in ("", "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            _, found, arguments = re.sub(r"(-m|--module) esam_dist ", "esam-dist ", line).partition("esam-dist ")
            if found:
                yield shlex.split(re.split(r" [|>] ", arguments)[0], comments=True)


def anchors(page):
    """What a link can name in a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_is_configured_and_measured(page):
    assert page.read_text() == tables.fill(page.read_text()), "run `make tables`"


def test_every_table_has_one_place():
    places = [found[2] for page in PAGES for found in tables.PLACE.finditer(page.read_text())]
    assert sorted(places) == sorted(tables.TABLES)


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_every_command_of_the_pages_is_understood(arguments):
    args = _parser().parse_args(arguments)
    if arguments[0] == "train":
        config.load(ROOT / args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
