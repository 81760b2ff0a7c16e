"""What the terminal shows of an evaluation: few lines, the rest is in the file."""

from __future__ import annotations

from esam_dist.errors import printable
from esam_dist.findings import ClassScore, Findings, by_accuracy, confused_pairs
from esam_dist.report.command import in_columns

FEW = 5
MANY = 2 * FEW


def summary(found: Findings) -> str:
    """The first line has the scores of the whole set; a table follows for what there is more to say of."""
    head = (
        f"{found.checkpoint}: accuracy {found.accuracy:.4f}, top-5 {found.top5_accuracy:.4f}, loss {found.loss:.4f} "
        f"over {found.num_samples} samples"
    )
    if found.left_out:
        head += f"; {found.left_out} could not be read"
    table = [["calibration", _calibration(found)], *_classes(found), *_confused(found), *_mistakes(found)]
    return "\n".join([head, in_columns(table), *_corruptions(found)])


def _calibration(found: Findings) -> str:
    told = sum((part.confidence or 0.0) * part.count for part in found.bins) / found.num_samples
    return (
        f"error {found.calibration_error:.4f} over {len(found.bins)} bins of confidence: {told:.4f} on average, for an "
        f"accuracy of {found.accuracy:.4f}"
    )


def _classes(found: Findings) -> list[list[str]]:
    scored = by_accuracy(found)
    if len(scored) <= MANY:
        return [["classes", ", ".join(map(_score, scored))]]
    return [
        ["worst classes", ", ".join(map(_score, scored[:FEW]))],
        ["best classes", ", ".join(map(_score, scored[: -FEW - 1 : -1]))],
    ]


def _score(score: ClassScore) -> str:
    return f"{printable(score.name)}: {score.accuracy:.3f} of {score.count}"


def _confused(found: Findings) -> list[list[str]]:
    pairs = confused_pairs(found)
    shown = ", ".join(
        f"{_name(found, true)} as {_name(found, predicted)}: {count} of {found.classes[true].count}"
        for true, predicted, count in pairs[:FEW]
    )
    return [["most confused", shown]] if shown else []


def _mistakes(found: Findings) -> list[list[str]]:
    lines = [
        f"{_name(found, mistake.true)} as {_name(found, mistake.predicted)} ({mistake.confidence:.3f}), loss "
        f"{mistake.loss:.2f}: {printable(mistake.sample)}"
        for mistake in found.mistakes[:FEW]
    ]
    return [["worst mistakes" if number == 0 else "", line] for number, line in enumerate(lines)]


def _corruptions(found: Findings) -> list[str]:
    if not found.corruptions:
        return []
    severities = sorted({score.severity for score in found.corruptions})
    of = {(score.name, score.severity): score.accuracy for score in found.corruptions}
    names = list(dict.fromkeys(score.name for score in found.corruptions))
    rows = [[name, *(f"{of[name, severity]:.4f}" for severity in severities)] for name in names]
    means = [sum(of[name, severity] for name in names) / len(names) for severity in severities]
    mean = ["mean", *(f"{value:.4f}" for value in means)]
    return [in_columns([["accuracy at severity", *map(str, severities)], *rows, mean])]


def _name(found: Findings, number: int) -> str:
    return printable(found.classes[number].name)
