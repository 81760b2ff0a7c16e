"""`esam-dist evaluate` as a user meets it: on a run of classes whose names are no ASCII, on other data, on ranks."""

import json
import os
import signal
import sys

import numpy as np
import pytest

from esam_dist import findings
from esam_dist.data.prepare.digits import Digits
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.evaluation import command, corruptions
from tests.commands import here, on_ranks, rows, under_torchrun

NAMES = ("null", "eins", "zwei", "drei", "vier", "fünf", "六", "sieben", "acht\x1b", "neun")


class NamedDigits(Digits):
    """Some digits to train on, and 23 to validate, of `classes` only, in that order."""

    def __init__(self, classes=range(10)):
        super().__init__(seed=0)
        self.class_names = tuple(NAMES[number] for number in classes)
        place = {number: place for place, number in enumerate(classes)}
        few = {"train": self.labels["train"][:160], "validation": self.labels["validation"][:23]}
        self._kept = {split: [i for i, label in enumerate(labels) if label in place] for split, labels in few.items()}
        self.labels = {split: [place[few[split][i]] for i in kept] for split, kept in self._kept.items()}
        self.digest += str(classes)

    def read(self, split, sample):
        return super().read(split, self._kept[split][sample])


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny):
    """A folder with a run, the data it was trained on, and other data: `data`, `other` and `run`."""
    root = tmp_path_factory.mktemp("evaluated")
    write_dataset(NamedDigits(), root / "data", Plan(samples_per_shard=40))
    write_dataset(NamedDigits((8, 6, 5, 3)), root / "other", Plan(samples_per_shard=5))
    settings = ("data.image_size=32", "method.name=sgd", f"data.path={root / 'data'}", f"run.folder={root / 'run'}")
    answer = here("train", tiny, *settings)
    assert answer.status == 0, answer.err
    return root


def test_all_that_is_found_is_written_and_a_little_is_shown(root, tmp_path):
    answer = here("evaluate", root / "run", "--checkpoint", "newest")
    assert answer.status == 0, answer.err
    found = findings.read(root / "run/evaluation.json")
    last = rows(root / "run", "validation")[-1]
    assert (found.accuracy, found.top5_accuracy) == (last["accuracy"], last["top5_accuracy"])
    assert found.loss == pytest.approx(last["loss"], rel=1e-6)
    assert [score.name for score in found.classes] == [*NAMES]
    assert found.num_samples == 23
    assert len(found.mistakes) == 23 - round(found.accuracy * 23)
    assert all(mistake.picture.startswith("data:image/png;base64,") for mistake in found.mistakes)
    assert found.mistakes[0].sample.startswith(str(root / "data/validation/shard-000000.tar:"))
    assert answer.out.endswith(f"written to {root / 'run/evaluation.json'}\n")
    assert "fünf: " in answer.out
    assert "\x1b" not in answer.out
    assert here("evaluate", root / "run", "--worst", 1, "--output", tmp_path / "one.json").status == 0
    assert len(findings.read(tmp_path / "one.json").mistakes) == 1


def test_other_data_of_some_of_the_classes_is_taken_by_name(root):
    assert here("evaluate", root / "run", "--worst", 99).status == 0
    assert here("evaluate", root / "run", "--worst", 99, "--data", root / "other").status == 0
    whole, part = (findings.read(root / "run" / name) for name in ("evaluation.json", "evaluation_other.json"))
    wanted = {3, 5, 6, 8}
    assert part.confusion == [entry for entry in whole.confusion if entry[0] in wanted]
    assert part.num_samples == sum(whole.classes[number].count for number in wanted) > 5
    told = [(m.true, m.predicted, m.picture) for m in whole.mistakes if m.true in wanted]
    assert [(m.true, m.predicted, m.picture) for m in part.mistakes] == told
    for mine, theirs in zip(part.classes, whole.classes, strict=True):
        assert mine.name == theirs.name
        assert mine.accuracy == (theirs.accuracy if NAMES.index(mine.name) in wanted else None)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "nowhere"], "data.path = nowhere: no such folder"),
        (["--output", "nowhere/x.json"], "nowhere/x.json: cannot be written; give another file (--output FILE)"),
        (["--worst", "-1"], "--worst -1: give a number"),
        (["--corruptions", "rain,fog"], "rain is no corruption; give all, or some of gaussian_noise"),
        (["--corruptions", "fog", "--severities", "1,6"], "--severities 1,6: give some of 1,2,3,4,5"),
        (["--corruptions", "fog", "data.image_size=16"], "data.image_size = 16: --corruptions takes images of 32"),
    ],
)
def test_a_mistake_is_one_line(root, words, line):
    if "--corruptions" in words:
        pytest.importorskip("imagecorruptions")
    answer = here("evaluate", root / "run", *words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert line in answer.err


def test_data_of_unknown_classes_is_refused_by_name(root, few_digits):
    answer = here("evaluate", root / "run", "--data", few_digits)
    assert (answer.status, answer.err.count("\n")) == (2, 1)
    assert (
        f"--data {few_digits}: the run has no class '0', '1', '2', '3', '4' and 5 more; it knows 'null'" in answer.err
    )


def test_without_the_package_corruptions_say_how_to_install_it(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    answer = here("evaluate", root / "run", "--corruptions", "all")
    assert (answer.status, answer.err.count("\n")) == (2, 1)
    assert corruptions.INSTALL in answer.err


def test_corruptions_are_the_same_for_every_sample_on_any_number_of_ranks_and_workers(root, tmp_path):
    pytest.importorskip("imagecorruptions")
    wanted = ("--corruptions", "gaussian_noise,impulse_noise", "--severities", "5,1")
    found = []
    for number, changes in enumerate(([], ["data.batch_size=5", "data.workers=1"])):
        out = tmp_path / f"{number}.json"
        assert here("evaluate", root / "run", *wanted, "--output", out, *changes).status == 0
        found.append(findings.read(out).corruptions)
    assert [(score.name, score.severity) for score in found[0]] == [
        ("gaussian_noise", 1), ("gaussian_noise", 5), ("impulse_noise", 1), ("impulse_noise", 5)
    ]  # fmt: skip
    assert [score.accuracy for score in found[0]] == [score.accuracy for score in found[1]]
    assert [score.loss for score in found[0]] == pytest.approx([score.loss for score in found[1]], rel=1e-5)
    assert found[0][1].loss > found[0][0].loss


def test_all_corruptions_change_pixels_more_with_severity_and_leave_numpys_draws_alone():
    library = pytest.importorskip("imagecorruptions")
    chosen = corruptions.chosen("all", "1,5", 32)
    assert [c.name for c in chosen[::2]] == library.get_corruption_names("common")
    before = np.random.get_state()[1].copy()
    picture = np.random.default_rng(0).integers(60, 190, (48, 48, 3)).astype(np.uint8)
    for corruption in [c for c in chosen if c.name != "glass_blur"]:  # which is compiled for seconds
        changed = [picture.copy() for _ in range(3)]
        for seed, pixels in zip((7, 7, 2**63 + 8), changed, strict=True):
            corruption(pixels, seed)
        assert np.array_equal(changed[0], changed[1])
        assert not np.array_equal(changed[0], picture)
    assert np.array_equal(np.random.get_state()[1], before)
    noisy = [np.full((48, 48, 3), 128, np.uint8) for _ in range(5)]
    for severity, pixels in enumerate(noisy, 1):
        corruptions.Corruption("gaussian_noise", severity)(pixels, 1)
    # The published standard deviations, less what is cut off at black and white.
    assert [np.std(pixels / 255) for pixels in noisy[:3]] == pytest.approx([0.08, 0.12, 0.18], rel=0.03)
    assert np.all(np.diff([pixels.std() for pixels in noisy]) > 0)


def test_a_signal_ends_it_at_once_and_the_launcher_is_watched(root, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command.lifeline, "hold", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    assert here("evaluate", root / "run", "--output", tmp_path / "x.json").status == 0
    assert seen == [signal.SIG_DFL]


@pytest.mark.slow
def test_three_ranks_find_what_one_finds(root, tmp_path):
    alone = here("evaluate", root / "run", "--output", tmp_path / "alone.json")
    answers = on_ranks("evaluate", root / "run", "--output", tmp_path / "three.json", count=3)
    assert [answer.status for answer in answers] == [0, 0, 0], answers[0].err
    assert [answer.out for answer in answers[1:]] == ["", ""]
    assert answers[0].out.splitlines()[0] == alone.out.splitlines()[0]
    one, three = (json.loads((tmp_path / name).read_text()) for name in ("alone.json", "three.json"))
    for exact in ("num_samples", "accuracy", "top5_accuracy", "classes", "confusion"):
        assert one[exact] == three[exact]
    for close in ("loss", "calibration_error"):
        assert three[close] == pytest.approx(one[close], rel=1e-5)
    assert [m["sample"] for m in one["mistakes"]] == [m["sample"] for m in three["mistakes"]]


@pytest.mark.slow
def test_a_mistake_under_torchrun_stands_at_the_end(root):
    answer = under_torchrun("evaluate", root / "run", "--data", "nowhere", **os.environ)
    assert answer.status != 0
    said = [line for line in answer.err.splitlines() if "no such folder" in line]
    assert [line.partition(":")[0].strip() for line in said] == ["esam-dist", "traceback"]
    assert answer.err.splitlines()[-2] == said[-1]
