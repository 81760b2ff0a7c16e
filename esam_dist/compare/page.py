"""The tables of a study, for the terminal and for its HTML page, which loads nothing from elsewhere."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from html import escape

from esam_dist.compare import statistics
from esam_dist.compare.plan import Cost, Variant
from esam_dist.compare.runs import Result, duration
from esam_dist.compare.statistics import Cell
from esam_dist.compare.study import Study, dump
from esam_dist.report import chart
from esam_dist.report.page import SHARE
from esam_dist.report.parts import document, numbers
from esam_dist.report.runs import Curve

CELLS = ("Method", "Budget", "Epochs", "Time", "FLOPs", "Seeds", "Diverged", "Accuracy", "On the front")
DIFFERENCES = ("Comparison", "Budget", "Seeds", "Difference", "p", "p (Holm)")
TARGETS = ("Method", "Target", "Reached by", "Median time")
COSTS = ("Method", "Seconds an update", "FLOPs an update", "Time of an image", "FLOPs of an image")
TRIALS = ("Trial", "Seed", "Held-out accuracy")
RESULTS = (
    *("method", "values", "config", "seed", "budget", "epochs", "updates", "budget_used"),
    *("accuracy", "averaged_accuracy", "seconds", "flops"),
)


def results_csv(results: Sequence[Result]) -> str:
    """A row a run; accuracies are empty where its loss was not finite."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(RESULTS)
    for r in results:
        run, raw = r.run, "" if r.diverged else f"{r.raw:.6f}"
        averaged = "" if r.averaged is None else f"{r.averaged:.6f}"
        values = ", ".join(f"{key}={value}" for key, value in run.variant.values.items())
        about = [run.variant.method, values, run.config_hash, run.seed, f"{run.budget:g}", f"{run.epochs:g}"]
        table.writerow(
            [*about, run.updates, f"{run.budget_used:.4f}", raw, averaged, f"{run.seconds:.4g}", f"{run.flops:.6g}"]
        )
    return text.getvalue()


def summary(study: Study, results: Sequence[Result]) -> list[list[str]]:
    """The main table, a row for each method at each budget."""
    cells = statistics.cells(study, results)
    front = statistics.front(cells)
    return [list(CELLS), *(_cell_row(cell, front) for cell in cells)]


def _cell_row(cell: Cell, front: list[Cell]) -> list[str]:
    run = cell.results[0].run if cell.results else None
    return [
        cell.method,
        f"{cell.budget:g}",
        f"{run.epochs:.4g}" if run else "-",
        duration(cell.seconds) if run else "-",
        f"{run.flops:.3g}" if run else "-",
        str(len(cell.results)),
        str(cell.diverged),
        _plus_minus(cell.mean, cell.half),
        "yes" if cell in front else "",
    ]


def differences(study: Study, results: Sequence[Result]) -> list[list[str]]:
    """The table of declared comparisons."""
    return [
        list(DIFFERENCES),
        *(
            [
                f"{row.methods[0]} - {row.methods[1]}",
                f"{row.budget:g}",
                str(row.num_seeds),
                _plus_minus(row.mean, row.half, sign="+"),
                _number(row.p),
                _number(row.p_holm),
            ]
            for row in statistics.differences(study, statistics.cells(study, results))
        ),
    ]


def targets(study: Study, results: Sequence[Result]) -> list[list[str]]:
    """The table of times to target."""
    return [
        list(TARGETS),
        *(
            [
                row.method,
                f"{row.target:g}",
                f"{row.num_reached} of {row.num_seeds} seeds",
                duration(row.seconds) if math.isfinite(row.seconds) else "not reached",
            ]
            for row in statistics.times_to_target(study, results)
        ),
    ]


def page(
    study: Study,
    results: Sequence[Result],
    trials: Sequence[Result],
    chosen: dict[str, Variant],
    costs: dict[str, Cost],
) -> str:
    """The report of a study, finished or not, as one HTML document."""
    total = len(study.methods) * len(study.budgets) * len(study.seeds)
    title = f"Comparison of {', '.join(study.methods)}"
    state = "finished" if len(results) == total else f"not finished: {len(results)} of {total} runs"
    body = [
        f"<h1>{escape(title)}</h1><p>{len(results)} runs, {state}. Accuracy: {study.accuracy}, on the validation "
        "images after the last update.</p>",
        _chart(study, statistics.cells(study, results)),
        _table("Accuracy", summary(study, results), 1, _accuracy_note(study)),
        _table("Declared comparisons", differences(study, results), 1, DIFFERENCES_NOTE),
        _table("Time to target", targets(study, results), 1, TARGETS_NOTE),
        _table("What an update costs", _costs(costs), 1, COSTS_NOTE),
        _table("What was tuned", _trials(study, trials), 1, _tuning_note(study, chosen)),
        f"<h2>What was declared</h2><p class='note'>Written before the first run.</p><pre>{escape(dump(study))}</pre>",
    ]
    return document(title, body)


DIFFERENCES_NOTE = (
    "Mean of the differences, paired by seed, and its 95% interval (Student's t). p: paired t-test, two-sided; Holm: "
    "corrected for all rows of this table."
)
TARGETS_NOTE = (
    "The first validation that reached the target, in any of a seed's runs; the median over seeds, where more than "
    "half of them reached it. Time as calibrated."
)
COSTS_NOTE = (
    "Measured in turn over all methods in one process, without reading data. The last two columns are relative to the "
    "first method."
)


def _accuracy_note(study: Study) -> str:
    first = next(iter(study.methods))
    unit = {"time": f"the time of so many epochs of {first}", "flops": f"the FLOPs of so many epochs of {first}"}
    return (
        f"Mean over seeds and its 95% interval (Student's t), from three seeds on. Budget: "
        f"{unit.get(study.equal, 'epochs')}. Time and FLOPs of a run: those of its updates, as calibrated. On the "
        "front: the best of its budget, and better than all that is cheaper."
    )


def _tuning_note(study: Study, chosen: dict[str, Variant]) -> str:
    names = "; ".join(variant.name for variant in chosen.values()) or "nothing yet"
    return f"On {study.tuning.share:g} of the training images, held out. Chosen: {names}."


def _chart(study: Study, cells: list[Cell]) -> str:
    colours = {name: chart.COLOURS[i % len(chart.COLOURS)] for i, name in enumerate(study.methods)}
    shown = []
    for name, colour in colours.items():
        own = [cell for cell in cells if cell.method == name]
        shown.append(chart.Line(name, colour, _curve(own), limits=SHARE))
    front = statistics.front(cells)
    drawn = chart.lines(
        "Accuracy against time",
        [*shown, chart.Line(FRONT, FRONT_COLOUR, _curve(front, bare=True), is_dashed=True)],
        "",
        AXIS,
    )
    if not drawn:
        return '<p class="note">For a chart at least two budgets are needed.</p>'
    note = '<p class="note">Mean over seeds; bands: 95% interval of the mean, from three seeds on.</p>'
    return f"{chart.legend({**colours, FRONT: FRONT_COLOUR})}<div style='max-width: 42rem'>{drawn}</div>{note}"


AXIS = "seconds, as calibrated"
FRONT, FRONT_COLOUR = "Pareto front", "#888"


def _curve(cells: Sequence[Cell], *, bare: bool = False) -> Curve:
    cells = [cell for cell in cells if cell.results]
    half = [math.nan if bare else cell.half for cell in cells]
    return Curve([cell.seconds for cell in cells], [cell.mean for cell in cells], half)


def _costs(costs: dict[str, Cost]) -> list[list[str]]:
    unit = next(iter(costs.values()))
    return [
        list(COSTS),
        *(
            [
                name,
                f"{cost.seconds:.4g}",
                f"{cost.flops:.4g}",
                f"{cost.of_an_image('time') / unit.of_an_image('time'):.3f}",
                f"{cost.of_an_image('flops') / unit.of_an_image('flops'):.3f}",
            ]
            for name, cost in costs.items()
        ),
    ]


def _trials(study: Study, trials: Sequence[Result]) -> list[list[str]]:
    if not study.is_tuned:
        return [list(TRIALS)]
    which = study.accuracy
    return [list(TRIALS), *([r.run.variant.name, str(r.run.seed), _number(r.accuracy(which))] for r in trials)]


def _table(heading: str, table: list[list[str]], words: int, note: str) -> str:
    if len(table) == 1:
        return f"<h2>{heading}</h2><p>None.</p>"
    return f'<h2>{heading}</h2>{numbers(table[0], table[1:], words)}<p class="note">{escape(note)}</p>'


def _plus_minus(mean: float, half: float, sign: str = "") -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.4f}" + ("" if math.isnan(half) else f" \u00b1 {half:.4f}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
