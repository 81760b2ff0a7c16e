"""The HTML page of runs, which can be mailed and archived: it needs nothing else."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from esam_dist.metrics.prometheus import PHASES
from esam_dist.report import chart, groups, mistakes
from esam_dist.report.parts import document, facts, numbers, wrapped
from esam_dist.report.runs import Curve, Group, Run, curve, phases


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
ACCURACY = Quantity("validation", "accuracy", "Validation accuracy", "top-1", SHARE)
VALIDATION_LOSS = Quantity("validation", "loss", "Validation loss", "", POSITIVE)
SHARPNESS = Quantity("train", "sharpness", "Rise of the loss", "", ANY)
BY_TIME = (ACCURACY, VALIDATION_LOSS)
BY_EPOCH = (
    ACCURACY,
    VALIDATION_LOSS,
    Quantity("validation", "averaged_accuracy", "Validation accuracy, averaged weights", "top-1", SHARE),
    Quantity("train", "loss", "Training loss", "", POSITIVE),
    Quantity("train", "kept_fraction", "Samples kept", "share of the batch", SHARE),
    Quantity("train", "images_per_second", "Throughput", "images/s", POSITIVE),
    Quantity("train", "grad_norm", "Gradient norm", "", POSITIVE),
    Quantity("train", "lr", "Learning rate", "", POSITIVE),
)
NOT_THE_MEASURE = ("method.gamma", "method.scope", "method.score")
"""Keys of a method that change neither the perturbation nor the loss whose rise is measured."""

BANDS = (
    "Lines: mean over seeds, where all have a value. Bands, from three seeds on: 95% confidence interval of the mean "
    "(Student's t). Dashed: a restart."
)
TIME = (
    "Time of training steps, without validation and checkpoints. A run whose rate has not come down yet is worse than "
    "it will be; `esam-dist compare` trains each method for the same time, to its end."
)
CHANCE = (
    "By seed where both have the same seeds. From three seeds on with the 95% interval of the difference (Student's t; "
    "Welch's where the seeds are not the same): where 0 lies outside, it is more than chance between seeds. Not "
    "corrected for the number of rows, as `esam-dist compare` is."
)
OWN_MEASURE = (
    "How much the loss of a batch rises at the weights that the method itself perturbs, along its own direction and "
    "radius. It tells how one run develops, not which network is flatter: ESAM perturbs only a part of the weights, "
    "ASAM's rho is in units of the weights, and with a smaller rho the loss rises less at the same place. So no axis "
    "is shared by methods that measure otherwise."
)


def page(shown: list[Group], passed_over: Sequence[str] = (), *, renew_seconds: float = 0.0) -> str:
    """The report of groups as one HTML document; `passed_over` says which folders hold no run."""
    runs = [run for members in shown for run in members.runs]
    colours = {members.name: chart.COLOURS[i % len(chart.COLOURS)] for i, members in enumerate(shown)}
    seconds = {members.name: phases(members) for members in shown}
    breakdown = chart.bars("Seconds per phase of a step", seconds, list(PHASES)) + _phases(seconds)
    title = shown[0].name if len(shown) == 1 else f"{len(shown)} methods, {len(runs)} runs"
    body = [
        f"<h1>Training report: {escape(title)}</h1>",
        "".join(f'<p class="note">Passed over: {escape(line)}</p>' for line in passed_over),
        numbers(groups.columns(shown), groups.rows(shown), words=2),
        _differences(shown),
        f"<h2>Curves</h2>{_curves(shown, colours)}",
        _sharpness(shown, colours),
        mistakes.section(runs),
        f"<h2>Where the time goes</h2>{breakdown or '<p>Not reported.</p>'}",
        _checkpoints(runs),
        f"<h2>Configuration</h2>{_configuration(runs)}",
        f"<h2>Environment</h2>{_environment(runs)}",
    ]
    return document(title, body, renew_seconds=renew_seconds)


def _note(text: str) -> str:
    parts = escape(text, quote=False).split("`")
    return f'<p class="note">{"".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))}</p>'


def _differences(shown: list[Group]) -> str:
    lines = groups.difference_table(shown)
    if not lines:
        return ""
    head = ("Difference", "Last accuracy", "0 outside the interval")
    return f"<h3>Differences</h3>{numbers(head, lines, words=1)}{_note(CHANCE)}"


def _curves(shown: list[Group], colours: dict[str, str]) -> str:
    by_epoch = [_chart(shown, colours, quantity) for quantity in BY_EPOCH]
    if len(shown) == 1:
        return f'<div class="charts">{"".join(by_epoch)}</div>{_note(BANDS)}'
    by_time = [_chart(shown, colours, quantity, by_time=True) for quantity in BY_TIME]
    return (
        f'{chart.legend(colours)}<h3>By time</h3><div class="charts">{"".join(by_time)}</div>{_note(TIME)}'
        f'<h3>By epoch</h3>{chart.legend(colours)}<div class="charts">{"".join(by_epoch)}</div>{_note(BANDS)}'
    )


def _chart(
    shown: list[Group], colours: dict[str, str], quantity: Quantity, *, by_time: bool = False, title: str = ""
) -> str:
    unit, axis = _unit_of_time(shown)
    lines = []
    for members in shown:
        found = curve(members, quantity.kind, quantity.key, by_time=by_time)
        if by_time:
            found = Curve([value / unit for value in found.x], found.y, found.half)
        marks = [] if by_time else [epoch for run in members.runs for epoch in run.restarts]
        lines.append(chart.Line(members.name, colours[members.name], found, marks, quantity.limits))
    axis = f"{axis} of training" if by_time else "epoch"
    return chart.lines(title or quantity.title, lines, quantity.unit, axis)


def _unit_of_time(shown: list[Group]) -> tuple[int, str]:
    longest = max(run.seconds for members in shown for run in members.runs)
    return next((unit for unit in ((3600, "hours"), (60, "minutes")) if longest >= 3 * unit[0]), (1, "seconds"))


def _sharpness(shown: list[Group], colours: dict[str, str]) -> str:
    """A chart for each measure of sharpness, so that no axis compares what cannot be compared."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for members in shown:
        alike.setdefault(_measure(members), []).append(members)
    drawn = [
        _chart(same, colours, SHARPNESS, title=f"{SHARPNESS.title}, {_measured_by(same[0])}") for same in alike.values()
    ]
    if not any(drawn):
        return ""
    return f'<h3>Sharpness, each by its own measure</h3><div class="charts">{"".join(drawn)}</div>{_note(OWN_MEASURE)}'


def _measure(members: Group) -> tuple[str, ...]:
    """All that says how the sharpness of a group is measured."""
    settings = members.runs[0].settings.items()
    kept = [f"{key} {value}" for key, value in settings if key.startswith("method.") and key not in NOT_THE_MEASURE]
    return tuple(sorted(kept))


def _measured_by(members: Group) -> str:
    """The same for a heading: the most of it."""
    told = members.runs[0].settings
    words = [f"{key} {told[f'method.{key}']}" for key in ("rho", "beta") if told.get(f"method.{key}")]
    return ", ".join([told.get("method.name", "?"), *words])


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


def _checkpoints(runs: list[Run]) -> str:
    """The best and the last of each run, and what makes a file of weights of it."""
    lines = []
    for run in runs:
        best, last = run.checkpoints
        if last is None:
            continue
        command = f"esam-dist export {shlex.quote(str(run.folder))} --format safetensors"
        cells = [escape(run.folder.name), _saved(best), _saved(last), f"<code>{wrapped(command)}</code>"]
        labels = ("Run", "Best", "Last", "Weights as a file")
        lines.append(
            "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels, cells, strict=True))
        )
    if not lines:
        return ""
    head = "<th>Run</th><th>Best</th><th>Last</th><th>Weights as a file</th>"
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>Checkpoints</h2><div class="table">{table}</div>'


def _saved(path: Path | None) -> str:
    if path is None:
        return "-"
    try:
        accuracy = json.loads((path / "metadata.json").read_bytes()).get("accuracy")
    except (OSError, ValueError, AttributeError):
        accuracy = None
    told = f" ({accuracy:.4f})" if isinstance(accuracy, float) else ""
    return escape(f"step {int(path.name.rpartition('_')[2])}{told}")


def _configuration(runs: list[Run]) -> str:
    # The folder is the name by which runs are told apart here.
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key != "run.folder"]
    return facts(_names(runs), {key: [run.settings.get(key, "-") for run in runs] for key in keys})


def _environment(runs: list[Run]) -> str:
    flat = [_flat(run.environment) for run in runs]
    commands = [values.pop("command", "-") for values in flat]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    shown = facts(_names(runs), {key: [values.get(key, "-") for values in flat] for key in keys})
    if not any(command != "-" for command in commands):
        return shown
    lines = "".join(
        f'<tr><td class="key">{escape(name)}</td><td><code>{wrapped(command)}</code></td></tr>'
        for name, command in zip(_names(runs), commands, strict=True)
    )
    table = f'<div class="table"><table>{lines}</table></div>'
    return f"{shown}<details><summary>The command{'s' if len(runs) > 1 else ''}</summary>{table}</details>"


def _names(runs: list[Run]) -> list[str]:
    """What to call each run: its folder's name, or its path where several have the same."""
    names = [run.folder.name for run in runs]
    return [str(run.folder) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _flat(values: dict[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}: {name}": str(entry) for name, entry in value.items()}
        else:
            found[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
