"""`esam-dist compare` on few digits: tuned, stopped, continued, finished, reported."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from esam_dist import compare
from esam_dist.data.dataset import open_split
from tests.commands import alone, environment, here, rows, wait_for

ACCURACY = "accuracy"


# Twelve runs, each of which imports torch: 40 seconds on two idle cores. What needs no run is in unit/test_study.py.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tiny, few_digits, tmp_path_factory):
    """A study of two methods with a value to choose, two budgets and two seeds: four trials and eight runs."""
    folder = tmp_path_factory.mktemp("compare")
    declared = {
        "base": str(tiny),
        "folder": str(folder / "study"),
        "overrides": {"method.name": "sgd", "checkpoint.keep": 1},
        "methods": {
            "sgd": {"grid": {"optim.weight_decay": [0.0, 0.001]}},
            "sam": {"overrides": {"method.name": "sam"}, "grid": {"method.rho": [0.05, 0.1]}},
        },
        "equal": "flops",
        "budgets": [1, 2],
        "seeds": [0, 1],
        "comparisons": [["sam", "sgd"]],
        "targets": [0.05, 0.9999],
        "repeats": 1,
        "jobs": 2,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(declared, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def study(file, monkeypatch_module):
    """The folder of that study, stopped in the middle of its runs and carried out to the end."""
    folder = file.parent / "study"
    before = (folder.exists(), here("compare", file, "--dry-run"), folder.exists())
    stopped = compare.run(argparse.Namespace(study=file, dry_run=False), lambda: len(finished(folder)) >= 3)
    kept = {run: (run / "history.json").read_bytes() for run in finished(folder)}
    half = (folder / "report.html").read_text(), (folder / "results.csv").read_text()
    ended = here("compare", file)
    return argparse.Namespace(folder=folder, before=before, stopped=stopped, kept=kept, half=half, ended=ended)


@pytest.fixture(scope="module")
def monkeypatch_module():
    """Runs are processes of this source tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment())
        yield patch


def finished(folder):
    """Run folders below `folder/runs` with a checkpoint of the last update."""
    return sorted(path.parent for path in folder.glob("runs/*/*/*/checkpoints") if is_finished(path.parent))


def is_finished(run):
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    epochs = yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"]
    return any(row["kind"] == "validation" and row["epoch"] >= epochs for row in map(json.loads, lines))


def results(study):
    with (study.folder / "results.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_a_dry_run_prints_the_plan_and_writes_nothing(study):
    existed, answer, exists = study.before
    assert (existed, exists, answer.status) == (False, False, 0)
    assert "4 trials and 8 runs: about" in answer.out
    assert "sam (rho 0.1), trial" in answer.out


def test_a_stopped_study_says_so_and_keeps_what_is_finished(study):
    assert study.stopped == 143
    assert 3 <= len(study.kept) < 8
    assert f"not finished: {len(study.kept)} of 8 runs" in study.half[0]
    assert len(study.half[1].splitlines()) == 1 + len(study.kept)


def test_what_was_finished_is_not_run_again_and_the_rest_is(study):
    assert study.ended.status == 0, study.ended
    assert "8 of 8 runs" in study.ended.out
    assert len(finished(study.folder)) == 8
    for run, history in study.kept.items():
        assert (run / "history.json").read_bytes() == history


def test_an_unfinished_study_is_balanced(study):
    # Of eight runs in order two go at a time: the three that finish first are of the first seed.
    assert sum(run.name == "seed_0" for run in study.kept) >= 3


def test_each_row_is_what_its_run_reported(study):
    found = results(study)
    assert [(row["method"], row["budget"], row["seed"]) for row in found] == [
        (method, budget, seed) for seed in "01" for budget in "12" for method in ("sgd", "sam")
    ]
    for row in found:
        run = study.folder / "runs" / row["method"] / f"budget_{row['budget']}" / f"seed_{row['seed']}"
        last = rows(run, "validation")[-1]
        assert float(row["accuracy"]) == pytest.approx(last[ACCURACY], abs=1e-6)
        assert (last["step"], rows(run)[-1]["step"]) == (int(row["updates"]), int(row["updates"]))
        assert row["averaged_accuracy"] == ""


def test_methods_have_equal_budgets_and_their_schedules_end_there(study):
    flops = {(row["method"], row["budget"]): float(row["flops"]) for row in results(study)}
    for budget in "12":
        assert flops["sam", budget] == pytest.approx(flops["sgd", budget], rel=0.1)
    for row in results(study):
        run = study.folder / "runs" / row["method"] / f"budget_{row['budget']}" / f"seed_{row['seed']}"
        rates = [entry["lr"] for entry in rows(run)]
        assert rates[-1] < 0.3 * max(rates)


def test_values_are_chosen_on_held_out_training_images(study, few_digits):
    derived = study.folder / "tuning_data"
    kept, held_out = open_split(derived, "train").num_samples, open_split(derived, "validation").num_samples
    assert kept + held_out == open_split(few_digits, "train").num_samples
    trials = sorted(study.folder.glob("tuning/*/*/*/*/config.yaml"))
    assert len(trials) == 4
    assert {yaml.safe_load(path.read_text())["data"]["path"] for path in trials} == {str(derived)}
    for method, key in (("sgd", "optim.weight_decay"), ("sam", "method.rho")):
        own = [path.parent for path in trials if f"/tuning/{method}/" in str(path)]
        best = max(own, key=lambda run: rows(run, "validation")[-1][ACCURACY])
        section, name = key.split(".")
        chosen = yaml.safe_load((best / "config.yaml").read_text())[section][name]
        assert {row["values"] for row in results(study) if row["method"] == method} == {f"{key}={chosen}"}


def test_everything_is_declared_before_and_reported_after(study):
    declared = yaml.safe_load((study.folder / "study.yaml").read_text())
    assert declared["comparisons"] == [["sam", "sgd"]]
    assert declared["tuning"]["share"] == 0.2
    calibration = json.loads((study.folder / "calibration.json").read_text())
    assert list(calibration["costs"]) == [
        *("sgd (weight_decay 0.0)", "sgd (weight_decay 0.001)"),
        *("sam (rho 0.05)", "sam (rho 0.1)"),
    ]
    report = (study.folder / "report.html").read_text()
    for words in ("finished", "sam - sgd", "2 of 2 seeds", "0 of 2 seeds", "not reached", "held out", "<polyline"):
        assert words in report, words


def test_another_study_in_the_same_folder_is_refused(study, file, tmp_path):
    declared = yaml.safe_load(file.read_text())
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(declared | {"seeds": [0, 1, 2]}, sort_keys=False))
    answer = here("compare", other)
    assert answer.status == 2
    assert "seeds: " in answer.err
    assert "choose another folder" in answer.err
    other.write_text(yaml.safe_dump(declared | {"jobs": 1}, sort_keys=False))
    assert here("compare", other).status == 0


@pytest.mark.slow
def test_a_killed_study_takes_its_runs_along_and_goes_on(file, tmp_path):
    declared = yaml.safe_load(file.read_text())
    methods = {name: {"overrides": {"method.name": name}} for name in ("sgd", "sam")}
    declared |= {"methods": methods, "folder": str(tmp_path / "study"), "budgets": [40], "seeds": [0], "jobs": 1}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(declared, sort_keys=False))
    run = tmp_path / "study/runs/sgd/budget_40/seed_0"
    command = [sys.executable, "-m", "esam_dist", "compare", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(run.glob("checkpoints/step_*")))
    process.kill()
    process.wait()
    wait_for(lambda: not (run / "run.lock").exists())
    assert json.loads((run / "history.json").read_text())["starts"] == 1
    assert len(rows(run, "validation")) < 40
    ended = alone("compare", path)
    assert ended.status == 0, ended
    assert json.loads((run / "history.json").read_text())["starts"] == 2
    assert [row["step"] for row in rows(run, "validation")] == [10 * (n + 1) for n in range(40)]


def test_a_run_that_fails_is_named_with_its_log(file, tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(os, "environ", environment())
    data = shutil.copytree(few_digits, tmp_path / "data")
    for split in ("train", "validation"):
        for shard in Path(data / split).glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
    declared = yaml.safe_load(file.read_text())
    methods = {name: {"overrides": {"method.name": name}} for name in ("sgd", "sam")}
    declared |= {"methods": methods, "folder": str(tmp_path / "study"), "budgets": [1], "seeds": [0], "jobs": 1}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(declared, sort_keys=False))
    monkeypatch.setattr(
        "esam_dist.compare.calibrate.costs",
        lambda study, keep: dict.fromkeys(("sgd", "sam"), compare.command.Cost(0.1, 1e6, 8)),
    )
    declared["overrides"] = {"data.path": str(data)}
    path.write_text(yaml.safe_dump(declared, sort_keys=False))
    answer = here("compare", path)
    assert answer.status == 2
    assert "sgd, budget 1, seed 0: ended with status 2" in answer.err
    assert (tmp_path / "study/runs/sgd/budget_1/seed_0/log.txt").read_text().count("esam-dist: error") == 1
    assert "0 of 2 runs" in answer.out
