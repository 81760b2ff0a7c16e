"""The part of the page about evaluations: scores side by side, then for each what the network gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from esam_dist.findings import ClassScore, Findings, Mistake, by_accuracy, confused_pairs
from esam_dist.report import diagram
from esam_dist.report.parts import numbers
from esam_dist.report.runs import Run

COLUMNS = ("Run", "Data", "Checkpoint", "Accuracy", "Top-5", "Loss", "Calibration error", "Worst class")
FEW = 10
MOST_SCORES = 2 * FEW + 5


class Evaluated(NamedTuple):
    """An evaluation, and the name of its run."""

    name: str
    found: Findings


def section(runs: Sequence[Run]) -> str:
    """The section; empty text where nothing was evaluated."""
    shown = [Evaluated(run.folder.name, found) for run in runs for found in run.evaluations]
    if not shown:
        return ""
    details = [
        f'<details class="run"{"" if number else " open"}><summary>{escape(_title(one))}</summary>'
        f"{_one(one.found)}</details>"
        for number, one in enumerate(shown)
    ]
    return (
        f"<h2>What is right and what is wrong</h2>{numbers(COLUMNS, [_row(one) for one in shown], words=3)}"
        f"{_corruptions(shown)}{''.join(details)}"
    )


def _title(one: Evaluated) -> str:
    return f"{one.name}, {_data(one.found)}: {100 * one.found.accuracy:.2f}% right"


def _data(found: Findings) -> str:
    return Path(found.data).name or found.data


def _row(one: Evaluated) -> list[str]:
    found, scored = one.found, by_accuracy(one.found)
    return [
        one.name,
        _data(found),
        Path(found.checkpoint).name + (", averaged" if found.averaged else ""),
        f"{found.accuracy:.4f}",
        f"{found.top5_accuracy:.4f}",
        f"{found.loss:.4f}",
        f"{found.calibration_error:.4f}",
        f"{scored[0].name}: {scored[0].accuracy:.3f}" if scored else "-",
    ]


def _one(found: Findings) -> str:
    parts = [_scores(found), diagram.matrix(found), diagram.reliability(found), _pairs(found)]
    sides = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'{_about(found)}<div class="sides">{sides}</div>{_wall(found)}'


def _about(found: Findings) -> str:
    lost = f"; {found.left_out} could not be read" if found.left_out else ""
    return (
        f'<p class="note">{found.num_samples} samples of {escape(found.data)}{lost}. Calibration error: '
        f"{found.calibration_error:.4f}, over {len(found.bins)} equal bins of confidence.</p>"
    )


def _scores(found: Findings) -> str:
    """Accuracy by class: of all, or of the worst and the best."""
    scored = by_accuracy(found)
    if len(scored) <= MOST_SCORES:
        return f"<figcaption>Accuracy by class</figcaption>{''.join(map(_score, scored))}"
    worst, best = scored[: 2 * FEW], scored[: -FEW - 1 : -1]
    return (
        f"<figcaption>The worst of {len(scored)} classes</figcaption>{''.join(map(_score, worst))}"
        f"<h3>The best</h3>{''.join(map(_score, best))}"
    )


def _score(score: ClassScore) -> str:
    share = score.accuracy or 0.0
    return (
        f'<div class="score"><span>{escape(score.name)}</span><i><b style="width:{100 * share:.1f}%"></b></i>'
        f"<small>{share:.3f} of {score.count}</small></div>"
    )


def _pairs(found: Findings) -> str:
    pairs = confused_pairs(found)[:FEW]
    if not pairs:
        return "<p>No sample is taken for another class.</p>"
    lines = [
        [
            found.classes[true].name,
            found.classes[predicted].name,
            f"{count} of {found.classes[true].count}",
        ]
        for true, predicted, count in pairs
    ]
    return f"<figcaption>Most confused</figcaption>{numbers(('True class', 'Taken for', 'Samples'), lines, words=2)}"


def _wall(found: Findings) -> str:
    if not found.mistakes:
        return ""
    pictures = "".join(_picture(found, mistake) for mistake in found.mistakes)
    return f'<h3>The worst mistakes, those of the highest loss</h3><div class="wall">{pictures}</div>'


def _picture(found: Findings, mistake: Mistake) -> str:
    true, predicted = (escape(found.classes[number].name) for number in (mistake.true, mistake.predicted))
    small = ' class="small"' if mistake.picture.startswith("data:image/png") else ""
    shown = '<div class="lost"></div>'
    if mistake.picture:
        shown = f'<img{small} src="{mistake.picture}" alt="{true}, taken for {predicted}" loading="lazy">'
    return (
        f'<figure title="{escape(mistake.sample)}">{shown}<figcaption><b>{true}</b> taken for <b>{predicted}</b><br>'
        f"{100 * mistake.confidence:.0f}% sure, loss {mistake.loss:.2f}</figcaption></figure>"
    )


def _corruptions(shown: Sequence[Evaluated]) -> str:
    """Accuracy under corruptions, a mean over severities; runs that were measured alike stand side by side."""
    measured = [one for one in shown if one.found.corruptions]
    if not measured:
        return ""
    names = list(dict.fromkeys(score.name for one in measured for score in one.found.corruptions))
    lines = [["none", *(f"{one.found.accuracy:.4f}" for one in measured)]]
    for name in names:
        own = [[s.accuracy for s in one.found.corruptions if s.name == name] for one in measured]
        lines.append([name.replace("_", " "), *(f"{sum(v) / len(v):.4f}" if v else "-" for v in own)])
    means = [[s.accuracy for s in one.found.corruptions] for one in measured]
    lines.append(["mean of all that is corrupted", *(f"{sum(v) / len(v):.4f}" for v in means)])
    severities = [sorted({s.severity for s in one.found.corruptions}) for one in measured]
    each = {", ".join(map(str, levels)) for levels in severities}
    note = f"Accuracy on corrupted images, as ImageNet-C corrupts them; mean over severities {'; or '.join(each)}."
    if len({tuple((s.name, s.severity) for s in one.found.corruptions) for one in measured}) > 1:
        note += " Not all runs were measured with the same corruptions: compare only rows of the same severities."
    head = ["Corruption", *(one.name for one in measured)]
    table = numbers(head, lines, words=1, stack=False)
    return f'<h3>Under corruptions</h3>{table}<p class="note">{escape(note)}</p>'
