"""The page of `esam-dist sharpness`: several checkpoints side by side, each measure on one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from esam_dist.report import chart
from esam_dist.report.parts import document, numbers
from esam_dist.report.runs import Curve

Found = dict[str, Any]


def page(measured: dict[str, Found]) -> str:
    """The measures of each checkpoint, by its name, as one HTML document."""
    names = list(measured)
    colours = {name: chart.COLOURS[i % len(chart.COLOURS)] for i, name in enumerate(names)}
    first = measured[names[0]]
    body = [
        "<h1>Sharpness</h1>",
        f'<p class="note">{first["samples"]} samples of the {escape(first["split"])} split, without augmentation; the '
        "network in evaluation mode. A number behind &#177; is a standard error. Compare rows, not other networks: "
        "sharpness depends on a network's scale.</p>",
        numbers(columns(measured), [row(name, measured) for name in names], words=1),
        chart.legend(colours),
        f'<div class="charts">{"".join(_charts(measured, colours))}</div>',
    ]
    planes = [(name, found["plane"]) for name, found in measured.items() if "plane" in found]
    if planes:
        losses = [value for _, plane in planes for line in plane["loss"] for value in line]
        drawn = [_plane(name, plane, (min(losses), max(losses))) for name, plane in planes]
        body.append(f'<h2>Loss on a plane</h2><div class="charts">{"".join(drawn)}</div>')
        body.append('<p class="note">Darker is lower; one logarithmic scale for all.</p>')
    return document("Sharpness", body)


def columns(measured: dict[str, Found]) -> list[str]:
    """The heads of the table."""
    first = next(iter(measured.values()))
    heads = ["Checkpoint", "Loss", "Gradient norm"]
    heads += ["Largest eigenvalue"] * ("eigenvalues" in first) + ["Trace"] * ("trace" in first)
    heads += [f"{m}-sharpness, rho {rho:g}" for m in first.get("m_sharpness", {}) for rho in first["rho"]]
    return heads + [f"average rise, rho {rho:g}" for rho in first["rho"] if "average_rise" in first]


def row(name: str, measured: dict[str, Found]) -> list[str]:
    """The table's words for one checkpoint, in the order of `columns`."""
    found = measured[name]
    words = [name, f"{found['loss']:.4g}", f"{found['gradient_norm']:.3g}"]
    if "eigenvalues" in found:
        words.append(f"{found['eigenvalues'][0]:.4g}")
    if "trace" in found:
        words.append(_with_error(found["trace"]))
    for rises in found.get("m_sharpness", {}).values():
        words += [_with_error(rise) for rise in rises]
    return words + [_with_error(rise) for rise in found.get("average_rise", [])]


def _with_error(estimate: Sequence[float]) -> str:
    mean, error = estimate
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} \u00b1 {error:.1g}"


def _charts(measured: dict[str, Found], colours: dict[str, str]) -> list[str]:
    drawn = []
    for m in next(iter(measured.values())).get("m_sharpness", {}):
        rises = {name: (found["rho"], found["m_sharpness"][m]) for name, found in measured.items()}
        drawn.append(_rises(f"Rise of the loss along the gradient of {m} samples", rises, colours))
    average = {
        name: (found["rho"], found["average_rise"]) for name, found in measured.items() if "average_rise" in found
    }
    drawn.append(_rises("Rise of the loss along random directions", average, colours))
    lines = [
        chart.Line(
            name,
            colours[name],
            Curve(found["line"]["place"], found["line"]["loss"], [math.nan] * len(found["line"]["place"])),
        )
        for name, found in measured.items()
        if "line" in found
    ]
    return [*drawn, chart.lines("Loss along a line, normalised by filter", lines, axis="distance")]


def _rises(title: str, rises: dict[str, tuple[list[float], list[list[float]]]], colours: dict[str, str]) -> str:
    lines = [
        chart.Line(name, colours[name], Curve([0.0, *rhos], [0.0, *(mean for mean, _ in found)], _halves(found)))
        for name, (rhos, found) in rises.items()
    ]
    return chart.lines(title, lines, axis="rho")


def _halves(found: list[list[float]]) -> list[float]:
    return [0.0, *(1.96 * error for _, error in found)]


def _plane(name: str, plane: Found, limits: tuple[float, float]) -> str:
    """A square of coloured cells; the checkpoint is in the middle."""
    low, high = (math.log(max(limit, 1e-6)) for limit in limits)
    side = 300 / len(plane["place"])
    cells = []
    for i, line in enumerate(plane["loss"]):
        for j, loss in enumerate(line):
            share = (math.log(max(loss, 1e-6)) - low) / max(high - low, 1e-12) if math.isfinite(loss) else 1.0
            cells.append(
                f'<rect x="{j * side:.2f}" y="{i * side:.2f}" width="{side + 0.1:.2f}" height="{side + 0.1:.2f}" '
                f'fill="hsl(210 60% {20 + 72 * min(1.0, share):.0f}%)"><title>{loss:.4g}</title></rect>'
            )
    picture = f'<svg viewBox="0 0 300 300" role="img" aria-label="{escape(name)}">{"".join(cells)}</svg>'
    return f"<figure><figcaption>{escape(name)}</figcaption>{picture}</figure>"
