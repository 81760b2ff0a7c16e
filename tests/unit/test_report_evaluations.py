"""Evaluations in the report: pictures that need nothing from elsewhere, names that are shown as text."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from test_report import write_run

from esam_dist import findings
from esam_dist.evaluation import measures
from esam_dist.findings import CorruptionScore, Findings, Mistake
from esam_dist.report import diagram, page, runs

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def evaluation(names, *, corruptions=(), data="data/photos"):
    """Of 400 samples, three quarters of them right, with two mistakes listed."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, len(names), 400)
    is_right = draw.random(400) < 0.75
    predicted = np.where(is_right, labels, (labels + 1) % len(names))
    confidence = draw.uniform(0.3, 1.0, 400)
    found = measures.Predictions(np.arange(400), labels, predicted, confidence, -np.log(confidence), is_right)
    error, bins = measures.calibration(confidence, is_right)
    wrong = [Mistake(sample=f"shard:{n}.png", true=0, predicted=1, confidence=0.9, loss=3.0) for n in "ab"]
    return Findings(
        checkpoint="runs/x/checkpoints/step_00000100", averaged=False, data=data, num_samples=400, left_out=1,
        accuracy=is_right.mean(), top5_accuracy=0.9, loss=0.5, calibration_error=error, bins=bins,
        classes=measures.class_scores(found, names), confusion=measures.confusion(found),
        mistakes=[wrong[0].model_copy(update={"picture": PIXEL}), wrong[1]], corruptions=[*corruptions],
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    """A page of two runs, the first evaluated on two datasets."""
    folders = [write_run(tmp_path / name, seed=seed).folder for seed, name in enumerate(("one", "two"))]
    scores = [
        CorruptionScore(name="fog", severity=severity, accuracy=0.8 - severity / 10, loss=1.0) for severity in (1, 5)
    ]
    names = ["一", "<b>bold</b>", "dog", "fünf"]
    findings.write(folders[0] / "evaluation.json", evaluation(names, corruptions=scores))
    findings.write(folders[0] / "evaluation_other.json", evaluation(names, data="data/other"))
    (folders[1] / "evaluation.json").write_text("{}")
    return page.page(runs.group([runs.read(folder) for folder in folders]))


def test_pictures_are_within_the_page_and_nothing_else_is_loaded(text):
    assert re.findall(r'src="([^"]*)"', text) == [PIXEL, PIXEL]
    assert not re.search(r"<script|<link|href=|url\(|@import|https?:", text)
    assert text.count('<div class="lost">') == 2


def test_names_are_text_and_drawings_are_well_formed(text):
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        ET.fromstring(drawing)
    assert "nan" not in "".join(drawings)


def test_each_evaluation_has_its_row_and_corruptions_their_mean(text):
    part = text.partition("<h2>What is right and what is wrong</h2>")[2]
    assert part.count("<summary>one, ") == 2
    for data in ("photos", "other"):
        assert f'data-label="Data">{data}</td>' in part
    assert "<td>fog</td><td class=number>0.5000</td>" in part
    assert "mean over severities 1, 5." in part


def test_a_broken_file_of_findings_is_one_warning(tmp_path, caplog):
    folder = write_run(tmp_path / "run").folder
    (folder / "evaluation.json").write_text('{"accuracy": 3}')
    assert runs.read(folder).evaluations == []
    assert "is not what `esam-dist evaluate` writes" in caplog.text
    assert "What is right" not in page.page(runs.group([runs.read(folder)]))


def test_confusion_matrix_has_a_cell_for_each_pair_up_to_fifty_classes():
    found = evaluation([f"c{number}" for number in range(50)])
    drawn = diagram.matrix(found)
    assert drawn.count("<rect") == 50 * 50
    true, predicted, count = found.confusion[1]
    of = found.classes[true].count
    assert f"<title>c{true} taken for c{predicted}: {count} of {of}</title>" in drawn
    assert diagram.matrix(evaluation([f"c{number}" for number in range(51)])) == ""


def test_reliability_diagram_has_a_bar_for_each_bin_that_has_samples():
    found = evaluation(["a", "b"])
    box = r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="right"'
    bars = re.findall(box, diagram.reliability(found))
    filled = [part for part in found.bins if part.count]
    assert len(bars) == len(filled) < len(found.bins)
    for (_, top, height), part in zip(bars, filled, strict=True):
        # Bars end at their accuracy, and all stand on the same line.
        assert float(height) == pytest.approx(diagram.SIDE * part.accuracy, abs=0.1)
        assert float(top) + float(height) == pytest.approx(diagram.TOP + diagram.SIDE, abs=0.1)
