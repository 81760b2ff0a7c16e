"""Makes a site of the pages as they are on GitHub: `make docs`, or `mkdocs build --strict`; a hook of mkdocs.

The pages link to files of the repository. Each that is linked to becomes a page of the site, so that no link leads out
of it, and the site needs no server of ours or of others. README.md is its first page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
TOP = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie at the top of the repository."""
API = "api.md"
LINK = re.compile(r"(\]\()([^)#\s]*)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".sbatch": "sh", ".json": "json"}
OBJECTS = {
    "Training in your own loop": ["esam_dist.SharpnessAware"],
    "Methods": ["esam_dist.methods.METHODS", "esam_dist.methods.Sharp", "esam_dist.methods.Phase"],
    "One step": ["esam_dist.step.Step", "esam_dist.step.StepStats", "esam_dist.step.Moment"],
    "An engine of your own": ["esam_dist.step.Engine"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what is not written."""
    config.nav = _written(config.nav)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages at the top, the reference, and what the pages link to."""
    for name, path in TOP.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    files.append(File.generated(config, API, content=_reference()))
    wanted = {
        path
        for file in list(files)
        if file.is_documentation_page()
        for path in _linked(file.src_uri, file.content_string)
    }
    while wanted:
        path = wanted.pop()
        if files.get_file_from_path(_place(path)) is None:
            files.append(_added(config, path))
            wanted |= set(_children(path))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Let links lead to where the site has what they name."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        path = _named(here, found[2])
        if path is None:
            return found[0]
        return found[1] + os.path.relpath(_place(path), PurePosixPath(here).parent) + found[3]

    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in FENCED.split(markdown))


def _written(entries: Any) -> Any:
    """The entries of a navigation whose pages there are."""
    kept = []
    for entry in entries:
        ((title, place),) = entry.items()
        if isinstance(place, list):
            kept.append({title: _written(place)})
        elif place in TOP or place == API or (ROOT / "docs" / place).exists():
            kept.append(entry)
    return [entry for entry in kept if [*entry.values()] != [[]]]


def _named(page: str, target: str) -> Path | None:
    """The path in the repository that a link of `page` names; None for what is no file of ours."""
    if not target or "://" in target or target.startswith("mailto:") or page.startswith("source/"):
        return None
    beside = ROOT if page in TOP else ROOT / "docs"
    path = (beside / target).resolve()
    return path.relative_to(ROOT) if path.exists() and path.is_relative_to(ROOT) else None


def _linked(page: str, text: str) -> set[Path]:
    found = {_named(page, target) for _, target, _ in LINK.findall(FENCED.sub("", text))}
    return {path for path in found if path is not None}


def _place(path: Path) -> str:
    """Where the site has a file of the repository."""
    for name, source in TOP.items():
        if str(path) == source:
            return name
    if path.parts[0] == "docs" and path.suffix in (".md", ".svg", ".png"):
        return path.relative_to("docs").as_posix()
    if path.suffix in (".png", ".svg"):
        return f"source/{path.as_posix()}"
    return f"source/{path.as_posix()}.md"


def _added(config: MkDocsConfig, path: Path) -> File:
    if (ROOT / path).is_dir():
        lines = [f"- [{child.name}]({PurePosixPath(path.name) / child.name}.md)" for child in _children(path)]
        return File.generated(config, _place(path), content=f"# {path}\n\n" + "\n".join(lines) + "\n")
    if path.suffix in (".png", ".svg"):
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text()
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    content = f"# {path}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"
    return File.generated(config, _place(path), content=content)


def _children(path: Path) -> list[Path]:
    """What lies in a folder, and can be shown."""
    if not (ROOT / path).is_dir():
        return []
    shown = [entry for entry in sorted((ROOT / path).iterdir()) if entry.is_dir() or entry.suffix in LANGUAGES]
    return [entry.relative_to(ROOT) for entry in shown if not entry.name.startswith((".", "__pycache__"))]


def _reference() -> str:
    """The page of what programs may call, which mkdocstrings fills."""
    parts = ["# Reference of the library\n", "How it is used: [library.md](library.md).\n"]
    for title, names in OBJECTS.items():
        parts += [f"## {title}\n", *(f"::: {name}\n" for name in names)]
    return "\n".join(parts)
