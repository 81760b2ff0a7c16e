"""Line and bar charts as SVG text: plain functions of numbers, no script and no library in the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

from esam_dist.report.runs import Curve

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800")
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
MOST_POINTS = 400
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One line of a chart, its band, and marks on the x axis (restarts)."""

    name: str
    colour: str
    curve: Curve
    marks: list[float] = field(default_factory=list)
    limits: tuple[float, float] = (-math.inf, math.inf)
    """The range of the quantity, which its band does not leave either."""
    is_dashed: bool = False
    """So that a line under it shows."""


def lines(title: str, shown: list[Line], unit: str = "", axis: str = "epoch") -> str:
    """A chart of `shown` over what `axis` says; empty text when no line has two finite points."""
    shown = [line for line in shown if len(_finite(line.curve)) > 1]
    if not shown:
        return ""
    points = [point for line in shown for point in _finite(line.curve)]
    x_low, x_high = min(0.0, *(p[0] for p in points)), max(p[0] for p in points)  # from 0: one axis for all charts
    y_low, y_high = _range([edge for line in shown for p in _finite(line.curve) for edge in _edges(p, line.limits)])

    def x(value: float) -> float:
        return LEFT + (value - x_low) / max(x_high - x_low, 1e-12) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x, y, (x_low, x_high), (y_low, y_high), axis)]
    for line in shown:
        thinned = _thin(_finite(line.curve))
        parts += [_mark(x(mark), line.colour) for mark in line.marks if x_low <= mark <= x_high]
        parts.append(_band(thinned, line.limits, x, y, line.colour))
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _ in thinned)
        parts.append(
            f'<polyline class="line{" mark" if line.is_dashed else ""}" stroke="{line.colour}" points="{path}">'
            f"<title>{escape(line.name)}</title></polyline>"
        )
    heading = f"{title} ({unit})" if unit else title
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heading)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(heading)}</figcaption>{svg}</figure>"


def bars(title: str, groups: dict[str, dict[str, float]], order: list[str]) -> str:
    """One horizontal bar per group, made of its phases in seconds; empty text when there is nothing to show."""
    groups = {name: seconds for name, seconds in groups.items() if sum(seconds.values()) > 0}
    if not groups:
        return ""
    longest = max(sum(seconds.values()) for seconds in groups.values())
    colours = {
        phase: colour
        for phase, colour in zip(order, COLOURS, strict=False)
        if any(seconds.get(phase) for seconds in groups.values())
    }
    parts = []
    for name, seconds in groups.items():
        left = 0.0
        drawn = []
        for phase, colour in colours.items():
            width = seconds.get(phase, 0.0) / longest * 960
            drawn.append(
                f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="20" fill="{colour}">'
                f"<title>{escape(phase)}: {seconds.get(phase, 0.0):.4g} s</title></rect>"
            )
            left += width
        label = f"{name}: {sum(seconds.values()):.4g} s"
        head = (
            f'<svg class="bar" viewBox="0 0 960 20" preserveAspectRatio="none" role="img" aria-label="{escape(name)}">'
        )
        parts.append(f"<div>{escape(label)}</div>{head}{''.join(drawn)}</svg>")
    return f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{legend(colours)}{"".join(parts)}</figure>'


def legend(colours: dict[str, str]) -> str:
    """Names beside their colours."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<p class="legend">{items}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (factor * step) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(x: Scale, y: Scale, x_range: tuple[float, float], y_range: tuple[float, float], axis: str) -> str:
    parts = []
    for value in ticks(*y_range):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{value:g}</text>')
    parts += [
        f'<text class="tick middle" x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}">{value:g}</text>'
        for value in (ticks(*x_range) if x_range[1] > x_range[0] else [])
    ]
    parts.append(f'<text class="tick middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{escape(axis)}</text>')
    return "".join(parts)


def _mark(x: float, colour: str) -> str:
    return (
        f'<line class="mark" stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        "<title>restart</title></line>"
    )


def _edges(point: tuple[float, float, float], limits: tuple[float, float]) -> tuple[float, float]:
    return max(limits[0], point[1] - point[2]), min(limits[1], point[1] + point[2])


def _band(
    points: list[tuple[float, float, float]], limits: tuple[float, float], x: Scale, y: Scale, colour: str
) -> str:
    if not any(half > 1e-9 * abs(value) for _, value, half in points):  # seeds may agree except for rounding
        return ""
    edges = [(x(point[0]), *map(y, _edges(point, limits))) for point in points]
    upper = [f"{px:.1f},{high:.1f}" for px, _, high in edges]
    lower = [f"{px:.1f},{low:.1f}" for px, low, _ in reversed(edges)]
    return f'<polygon class="band" fill="{colour}" points="{" ".join(upper + lower)}"/>'


def _finite(curve: Curve) -> list[tuple[float, float, float]]:
    triples = zip(curve.x, curve.y, curve.half, strict=True)
    return [(px, py, half if math.isfinite(half) else 0.0) for px, py, half in triples if math.isfinite(py)]


def _thin(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin
