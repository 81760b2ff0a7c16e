"""The site of the documentation: every link and anchor leads somewhere, and nothing is loaded from elsewhere."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT, environment

CONFIG = ROOT / "mkdocs.yml"


class Tags(html.parser.HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.loaded.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href") or "")


def test_every_page_stands_in_the_navigation():
    text = re.sub(r"!!python/\S+ ", "", CONFIG.read_text())
    places = re.findall(r"[\w.]+\.md", str(yaml.safe_load(text)["nav"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(places)
    assert len(places) == len(set(places))
    # Those that are not written yet are left out, and the others made of what lies elsewhere.
    assert {"index.md", "api.md", "changelog.md", "contributing.md"} <= set(places)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        tags = Tags()
        tags.feed(page.read_text())
        assert not [place for place in tags.loaded if re.match(r"(https?:)?//", place)], page
    assert "SharpnessAware" in (tmp_path / "api.html").read_text()
    first = (tmp_path / "index.html").read_text()
    assert 'href="keys.html"' in first


def test_a_link_that_leads_nowhere_is_an_error_of_the_site():
    told = CONFIG.read_text()
    assert "anchors: warn" in told
    assert "not_found: warn" in told
    assert "mkdocs build --strict" in Path(ROOT / "Makefile").read_text()
