"""What the pages say of keys, costs and files is true; their commands: test_documented_commands."""

import re
import shlex
from pathlib import Path

import pytest

from docs import tables
from esam_dist import config
from esam_dist.run_folder import MAY_CHANGE

ROOT = Path(__file__).resolve().parents[2]
PAGES = tables.pages()


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


def test_what_may_change_in_a_run_folder_is_told():
    text = (ROOT / "docs/recover.md").read_text()
    told = text.partition("may change: ")[2].partition("For anything else")[0]
    assert all(f"`{key.removesuffix('.*')}`" in told for key in MAY_CHANGE)


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
