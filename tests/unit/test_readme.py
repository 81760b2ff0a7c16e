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


def overrides():
    """Every `section.key=value ...` in a line of the pages; what is to be filled in stands in capitals."""
    for page in PAGES:
        lines = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+=[^`\n]+)`", lines):
            words = shlex.split(code) if code.count("'") % 2 == 0 else [code]
            sections = {re.fullmatch(r"(\w+)\.\w+=(?![A-Z]+$).+", word) for word in words}
            if None not in sections and {found[1] for found in sections} <= config.Config.model_fields.keys():
                yield pytest.param(words, id=f"{page.name}: {code}")


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
    # What is to be filled in stands in capitals.
    if arguments[0] == "train" and args.config != Path("CONFIG"):
        config.load(ROOT / args.config, args.overrides)


@pytest.mark.parametrize("words", list(overrides()))
def test_every_override_of_the_pages_is_taken(words):
    config.load(ROOT / "configs/digits_esam.yaml", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
