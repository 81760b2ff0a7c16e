"""The HTML page. It loads no script, font or picture from elsewhere, so that it can be mailed and archived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from esam_dist.metrics.prometheus import PHASES
from esam_dist.report import chart
from esam_dist.report.runs import Group, Run, curve, interval, phases

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg.bar { height: 20px; margin-bottom: .5rem; }
.line { fill: none; stroke-width: 1.8; } .band { opacity: .18; }
.grid { stroke: var(--line); } .mark { stroke-dasharray: 4 3; }
.tick { font-size: 12px; fill: currentColor; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px; }
.note { color: var(--soft); font-size: .9rem; } td.config { overflow-wrap: anywhere; min-width: 8rem; }
"""


class Quantity(NamedTuple):
    """What one chart shows."""

    kind: str
    """Of the rows of metrics.jsonl."""
    key: str
    """In those rows."""
    title: str
    unit: str
    limits: tuple[float, float]


ANY, POSITIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)
CHARTS = (
    Quantity("train", "loss", "Training loss", "", POSITIVE),
    Quantity("validation", "accuracy", "Validation accuracy", "top-1", SHARE),
    Quantity("validation", "averaged_accuracy", "Validation accuracy, averaged weights", "top-1", SHARE),
    Quantity("validation", "loss", "Validation loss", "", POSITIVE),
    Quantity("train", "sharpness", "Sharpness", "rise of the loss at the perturbed weights", ANY),
    Quantity("train", "kept_fraction", "Samples kept", "share of the batch", SHARE),
    Quantity("train", "images_per_second", "Throughput", "images/s", POSITIVE),
    Quantity("train", "grad_norm", "Gradient norm", "", POSITIVE),
    Quantity("train", "lr", "Learning rate", "", POSITIVE),
)
COLUMNS = (
    "Runs",
    "Seeds",
    "Best accuracy",
    "Last accuracy",
    "Validation loss",
    "Images/s",
    "Training time",
    "Restarts",
    "Skipped updates",
)


def page(groups: list[Group]) -> str:
    """The report of `groups` as one HTML document."""
    runs = [run for members in groups for run in members.runs]
    colours = {members.name: chart.COLOURS[i % len(chart.COLOURS)] for i, members in enumerate(groups)}
    drawn = [_chart(groups, colours, quantity) for quantity in CHARTS]
    seconds = {members.name: phases(members) for members in groups}
    breakdown = chart.bars("Seconds per phase of a step", seconds, list(PHASES)) + _phases(seconds)
    title = groups[0].name if len(groups) == 1 else f"{len(groups)} methods, {len(runs)} runs"
    body = [
        f"<h1>Training report: {escape(title)}</h1>",
        numbers(COLUMNS, rows(groups), words=2),
        f'<h2>Curves</h2>{chart.legend(colours)}<div class="charts">{"".join(drawn)}</div>',
        '<p class="note">Lines: mean over seeds, where all have a value. Bands, from three seeds on: 95% confidence '
        "interval of the mean (Student's t). Dashed: a restart.</p>",
        f"<h2>Where the time goes</h2>{breakdown or '<p>Not reported.</p>'}",
        f"<h2>Configuration</h2>{_configuration(runs)}",
        f"<h2>Environment</h2>{_environment(runs)}",
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """The parts of `body` as one HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def rows(groups: list[Group]) -> list[list[str]]:
    """The summary, one row of words per group, in the order of `COLUMNS`."""
    return [_row(members) for members in groups]


def _row(members: Group) -> list[str]:
    validated = [run.validation for run in members.runs if run.validation]
    last = [values[-1] for values in validated]
    speed = [row["images_per_second"] for run in members.runs for row in run.train if row.get("images_per_second")]
    hours = sum(run.hours for run in members.runs) / len(members.runs)
    return [
        members.name,
        ", ".join(run.seed for run in members.runs),
        _number([max(row["accuracy"] for row in values) for values in validated], 4),
        _number([row["accuracy"] for row in last], 4),
        _number([row["loss"] for row in last if row["loss"] is not None], 4),
        f"{sorted(speed)[len(speed) // 2]:.0f}" if speed else "-",
        f"{hours:.2f} h" if hours >= 1 else f"{hours * 60:.1f} min",
        str(sum(len(run.restarts) for run in members.runs)),
        str(sum(row.get("skipped_updates", 0) for run in members.runs for row in run.train)),
    ]


def _number(values: list[float], digits: int) -> str:
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" \u00b1 {half:.{digits}f}")


def _phases(seconds: dict[str, dict[str, float]]) -> str:
    """The numbers of the bars, for print and for readers who cannot point at a bar."""
    shown = [phase for phase in PHASES if any(values.get(phase) for values in seconds.values())]
    if not shown:
        return ""
    lines = [
        [name, *(f"{values[phase]:.4f}" if values.get(phase) else "-" for phase in shown)]
        for name, values in seconds.items()
    ]
    return numbers(["Seconds", *shown], lines, words=1)


def numbers(columns: Sequence[str], table: list[list[str]], words: int) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    head = "".join(f"<th{' class=number' if i >= words else ''}>{column}</th>" for i, column in enumerate(columns))
    lines = []
    for row in table:
        cells = "".join(f"<td{' class=number' if i >= words else ''}>{escape(word)}</td>" for i, word in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _chart(groups: list[Group], colours: dict[str, str], quantity: Quantity) -> str:
    shown = []
    for members in groups:
        marks = [epoch for run in members.runs for epoch in run.restarts]
        drawn = curve(members, quantity.kind, quantity.key)
        shown.append(chart.Line(members.name, colours[members.name], drawn, marks, quantity.limits))
    return chart.lines(quantity.title, shown, quantity.unit)


def _configuration(runs: list[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return _facts(runs, {key: [run.settings.get(key, "-") for run in runs] for key in keys})


def _environment(runs: list[Run]) -> str:
    flat = [_flat(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    return _facts(runs, {key: [values.get(key, "-") for values in flat] for key in keys})


def _flat(values: dict[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}: {name}": str(entry) for name, entry in value.items()}
        else:
            found[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _wrapped(text: str) -> str:
    """`text` with places where paths and `key=value` may break in a narrow column."""
    return escape(text).replace("/", "/<wbr>").replace("=", "=<wbr>")


def _facts(runs: list[Run], table: dict[str, list[str]]) -> str:
    if not table:
        return "<p>Not reported.</p>"
    head = "".join(f"<th>{escape(run.folder.name)}</th>" for run in runs)
    same, differing = [], []
    for key, values in table.items():
        if len(set(values)) == 1:
            same.append(f'<tr><td>{escape(key)}</td><td class="config">{_wrapped(values[0])}</td></tr>')
        else:
            cells = "".join(f'<td class="config">{_wrapped(value)}</td>' for value in values)
            differing.append(f'<tr class="differs"><td>{escape(key)}</td>{cells}</tr>')
    alike = f'<div class="table"><table>{"".join(same)}</table></div>'
    if len(runs) == 1:
        return alike
    shown = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(differing)}</tbody></table>"
    shown = f'<div class="table">{shown}</div>'
    return f"{shown}<details><summary>The same in all runs: {len(same)} values</summary>{alike}</details>"
