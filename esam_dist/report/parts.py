"""What pages are made of: the document with its style, and tables. Nothing is loaded from elsewhere, no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #777; --faint: #8881; --accent: #0072b2; --other: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --soft: #999; --accent: #56b4e9; --other: #e69f00; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
div.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-size: .85rem; font-weight: 600; vertical-align: bottom; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; } td.number, table.wide th { white-space: nowrap; } td.number small { color: var(--soft); }
td.key { min-width: 9rem; width: 15rem; } td code { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.75rem 2.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .25rem; }
svg { width: 100%; height: auto; display: block; } svg.bar { height: 20px; margin-bottom: .6rem; border-radius: 3px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { opacity: .18; }
.grid { stroke: var(--line); } .mark { stroke-dasharray: 4 3; }
.tick { font-size: 13px; fill: var(--soft); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.legend { margin: .25rem 0 .75rem; } .legend span { margin-right: 1.2rem; display: inline-block; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px; }
.note { color: var(--soft); font-size: .88rem; max-width: 50rem; } td.config { overflow-wrap: anywhere; }
td.config span { display: inline-block; margin-right: 1.25rem; } td.config small { color: var(--soft); }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); }
details.run > summary { font-size: 1rem; font-weight: 600; color: inherit; padding: .35rem 0; }
.sides { columns: 2 20rem; column-gap: 2.5rem; } .sides > * { break-inside: avoid; padding-bottom: 1.75rem; }
.sides > * > figure { max-width: 27rem; }
.score { display: grid; grid-template-columns: minmax(4rem, 9rem) 1fr 7.5rem; gap: .6rem; align-items: center; }
.score i { height: .7rem; background: var(--faint); border-radius: 2px; overflow: hidden; }
.score i b { display: block; height: 100%; background: var(--accent); } .score span { overflow-wrap: anywhere; }
.score small { color: var(--soft); text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 1rem .9rem; }
.wall img, .wall .lost { width: 100%; aspect-ratio: 1; display: block; border-radius: 4px; background: var(--faint); }
.wall img.small { image-rendering: pixelated; }
.wall figcaption { font-weight: 400; font-size: .82rem; line-height: 1.35; margin: .3rem 0 0; overflow-wrap: anywhere; }
.gap { stroke: var(--other); stroke-width: 2.5; } .right { fill: var(--accent); } .wrong { fill: var(--other); } .plain { fill: currentColor; }
@media (max-width: 40rem) {
  body { margin-top: 1rem; padding: 0 .9rem; } td.key { width: auto; }
  table.stack thead { display: none; } table.stack tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  table.stack td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right; }
  table.stack td::before { content: attr(data-label); color: var(--soft); text-align: left; font-weight: 400; }
  table.stack td br { display: none; } .score { grid-template-columns: 4.5rem 1fr 6.5rem; }
  table.stack td:first-child { font-weight: 600; } table.stack td:first-child::before { content: none; }
}
"""  # noqa: E501
STACKED = 5
"""Columns from which on a table becomes a list on a narrow screen."""


def document(title: str, body: Sequence[str], *, renew_seconds: float = 0.0) -> str:
    """The parts of `body` as one HTML document, which a browser reads again every `renew_seconds` (0: never)."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    if renew_seconds:
        head += f'<meta http-equiv="refresh" content="{renew_seconds:g}">'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def numbers(columns: Sequence[str], table: list[list[str]], words: int, *, stack: bool = True) -> str:
    """A table whose first `words` columns are words, the others numbers.

    With many columns it becomes a list on a narrow screen, unless `stack` is false: then it can be moved sideways.
    """
    is_stacked = stack and len(columns) >= STACKED
    head = "".join(f"<th{_class(i, words)}>{escape(column)}</th>" for i, column in enumerate(columns))
    lines = []
    for row in table:
        labels = [f' data-label="{escape(column)}"' if is_stacked else "" for column in columns]
        cells = "".join(f"<td{_class(i, words)}{labels[i]}>{_cell(i, words, word)}</td>" for i, word in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    start = '<table class="stack">' if is_stacked else "<table>" if stack else '<table class="wide">'
    return f'<div class="table">{start}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(place: int, words: int, word: str) -> str:
    """A word as text; what stands in brackets behind a number is set small, on a line of its own where it is long."""
    value, bracket, more = word.partition(" (")
    if place < words or not bracket:
        return escape(word)
    return f"<div>{escape(value)} <br><small>({escape(more)}</small></div>"


def _class(place: int, words: int) -> str:
    return " class=number" if place >= words else ""


def wrapped(text: str) -> str:
    """`text` with places where paths and `key=value` may break in a narrow column."""
    return escape(text).replace("/", "/<wbr>").replace("=", "=<wbr>")


def facts(names: Sequence[str], table: dict[str, list[str]]) -> str:
    """Values of runs by key: of those that differ each value once, with the runs that have it; the others folded away.

    `names` are those of the runs; `-` stands for a value that a run does not have.
    """
    if not table:
        return "<p>Not reported.</p>"
    same, differing, of_some = [], [], []
    for key, values in table.items():
        if len(set(values)) == 1:
            same.append(_fact(key, wrapped(values[0])))
        elif len({*values} - {"-"}) > 1:
            differing.append(_fact(key, _who_has_what(names, values), ' class="differs"'))
        else:
            of_some.append(_fact(key, _who_has_what(names, values)))
    if len(names) == 1:
        return _fact_table(same)
    shown = _fact_table(differing) if differing else "<p>Nothing differs.</p>"
    if of_some:
        summary = f"Only some of the runs have: {len(of_some)} values"
        shown += f"<details><summary>{summary}</summary>{_fact_table(of_some)}</details>"
    return f"{shown}<details><summary>The same in all runs: {len(same)} values</summary>{_fact_table(same)}</details>"


def _fact(key: str, cell: str, style: str = "") -> str:
    return f'<tr{style}><td class="key">{escape(key)}</td><td class="config">{cell}</td></tr>'


def _fact_table(lines: Sequence[str]) -> str:
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _who_has_what(names: Sequence[str], values: Sequence[str]) -> str:
    owners: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        owners.setdefault(value, []).append(name)
    return "".join(
        f"<span>{wrapped(value) or '(empty)'} <small>{escape(', '.join(own))}</small></span>"
        for value, own in owners.items()
        if value != "-"
    )
