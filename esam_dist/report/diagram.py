"""Drawings of one evaluation, as SVG text: how far confidence can be trusted, and what is taken for what."""

from __future__ import annotations

from collections import Counter
from html import escape

from esam_dist.findings import Findings

MOST_CLASSES = 50
"""Classes up to which a confusion matrix can be read."""
MOST_NUMBERED = 15
SIDE, LEFT, TOP, BOTTOM = 300, 40, 8, 34
STRIP = 44
LONGEST = 16


def reliability(found: Findings) -> str:
    """Accuracy over confidence, bin by bin, beside the diagonal of a network that is as good as it says; and counts."""

    def x(share: float) -> float:
        return LEFT + share * SIDE

    def y(share: float) -> float:
        return TOP + (1 - share) * SIDE

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick end" x="{x(0) - 6}" y="{y(tick) + 4}">{tick:g}</text>')
        parts.append(f'<text class="tick middle" x="{x(tick)}" y="{y(0) + STRIP + 28}">{tick:g}</text>')
    most = max(part.count for part in found.bins)
    for part in found.bins:
        if part.accuracy is None or part.confidence is None:
            continue
        left, width = x(part.low) + 1, x(part.high) - x(part.low) - 2
        told = f"confidence {part.confidence:.3f}, accuracy {part.accuracy:.3f}, {part.count} samples"
        middle, ends = left + width / 2, (y(part.accuracy), y(part.confidence))
        parts.append(_box(left, y(part.accuracy), width, y(0) - y(part.accuracy), 'class="right" opacity=".75"', told))
        parts.append(f'<line class="gap" x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        parts.append(
            f'<circle class="wrong" cx="{middle:.1f}" cy="{ends[1]:.1f}" r="3.5"><title>{told}</title></circle>'
        )
        tall = max(1.0, part.count / most * (STRIP - 10))
        parts.append(_box(left, y(0) + STRIP - tall + 6, width, tall, 'class="plain" opacity=".4"', told))
    parts.append(f'<line class="mark" stroke="currentColor" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    height = TOP + SIDE + STRIP + BOTTOM + 14
    parts.append(f'<text class="tick middle" x="{x(0.5)}" y="{height - 4}">confidence</text>')
    heading = "Reliability: accuracy over confidence"
    svg = f'<svg viewBox="0 0 {LEFT + SIDE + 14} {height}" role="img" aria-label="{heading}">{"".join(parts)}</svg>'
    note = (
        '<p class="note">Blue: accuracy of the samples in a bin of confidence. Orange: from there to their mean '
        "confidence; the mean length over samples is the calibration error. Dashed: where both agree. Grey: how many "
        "samples.</p>"
    )
    return f"<figure><figcaption>{heading}</figcaption>{svg}</figure>{note}"


def matrix(found: Findings) -> str:
    """The confusion matrix of the classes that occur; empty text where they are too many."""
    counts = {(true, predicted): count for true, predicted, count in found.confusion}
    shown = sorted({number for pair in counts for number in pair})
    if len(shown) > MOST_CLASSES:
        return ""
    totals: Counter[int] = Counter()
    for (true, _), count in counts.items():
        totals[true] += count
    names = [_short(found.classes[number].name) for number in shown]
    cell = max(13.0, min(30.0, 360 / len(shown)))
    room = 12 + 7.2 * max(map(_width, names))
    parts = []
    for row, true in enumerate(shown):
        middle = room + row * cell + cell / 2
        parts.append(f'<text class="tick end" x="{room - 6:.1f}" y="{middle + 4:.1f}">{escape(names[row])}</text>')
        turned = f'transform="rotate(-90 {middle:.1f} {room - 6:.1f})"' if _are_long(names) else ""
        kind = "tick" if turned else "tick middle"
        parts.append(
            f'<text class="{kind}" x="{middle + (4 if turned else 0):.1f}" y="{room - 6:.1f}" {turned}>'
            f"{escape(names[row])}</text>"
        )
        for column, predicted in enumerate(shown):
            place = (room + column * cell, room + row * cell)
            count = counts.get((true, predicted), 0)
            told = f"{found.classes[true].name} taken for {found.classes[predicted].name}: {count} of {totals[true]}"
            parts.append(_cell(place, cell, count / max(1, totals[true]), true == predicted, told))
            if count and len(shown) <= MOST_NUMBERED:
                parts.append(
                    f'<text class="tick middle plain" x="{place[0] + cell / 2:.1f}" y="{place[1] + cell / 2 + 4:.1f}">'
                    f"{count}</text>"
                )
    side = room + len(shown) * cell + 6
    heading = "Confusion: true class in rows"
    svg = f'<svg viewBox="0 0 {side:.0f} {side:.0f}" role="img" aria-label="{heading}">{"".join(parts)}</svg>'
    return f'<figure style="max-width:{max(24, side / 16):.0f}rem"><figcaption>{heading}</figcaption>{svg}</figure>'


def _cell(place: tuple[float, float], side: float, share: float, is_right: bool, told: str) -> str:
    # A root, so that one mistake in a hundred can be seen.
    shade = 0.06 if share == 0.0 else 0.15 + 0.7 * share**0.5
    kind = "plain" if share == 0.0 else "right" if is_right else "wrong"
    size = side - 1.5
    return _box(*place, size, size, f'class="{kind}" opacity="{shade:.2f}" rx="2"', told)


def _box(*values: object) -> str:
    x, y, width, height, style, told = values
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}>'
        f"<title>{escape(str(told))}</title></rect>"
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\u2026"


def _width(name: str) -> int:
    return sum(1 if ord(char) < 0x2E80 else 2 for char in name)


def _are_long(names: list[str]) -> bool:
    return max(map(_width, names)) > 2
