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


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What a link can name in a page: its headings, as GitHub spells them; of equal ones, the second has a `-1`."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.count(anchor)
        found.append(f"{anchor}-{count}" if count else anchor)
    return set(found)


def broken_links(page):
    """The links of a page that lead nowhere: to no file, to no heading, or to a file outside of the repository."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if "://" not in target:
            there = page.parent / target if target else page
            if not there.exists() or not there.resolve().is_relative_to(page.parents[1]):
                yield target
            elif anchor and (there.suffix != ".md" or anchor not in anchors(there)):
                yield f"{target}#{anchor}"


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
def test_every_link_leads_to_a_file_and_to_a_heading(page):
    assert [*broken_links(page)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    (page.parent / "other.md").write_text("# One\n## Two `words`, and more\n## One\n```sh\n# no heading\n```\n")
    good = "[a](other.md) [b](other.md#two-words-and-more) [c](other.md#one-1) [d](#page) [e](https://x.y/z)"
    bad = ["nothing.md", "other.md#two", "other.md#no-heading", "other.md#one-2", "#none", "../../etc"]
    page.write_text(f"# Page\n{good}\n```\n[f](code.md)\n```\n" + " ".join(f"![g]({target})" for target in bad))
    assert [*broken_links(page)] == bad
