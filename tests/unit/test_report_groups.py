"""Several methods in one report: by time, with marked differences, and no axis for what cannot be compared."""

import json
import math
import re
import unicodedata

import pytest
from scipy.stats import ttest_ind, ttest_rel
from test_report import write_run

from esam_dist.errors import UserError
from esam_dist.report import groups, page, runs
from esam_dist.report.command import in_columns
from tests.commands import here


def write(folder, accuracies, *, method="sgd", seeds=None, step_seconds=1.0, keys=()):
    """A group of runs of 100 steps, validated at 50 and 100 with 0.1 less and with these accuracies."""
    found = []
    for number, accuracy in enumerate(accuracies):
        seed = seeds[number] if seeds else number
        path = folder / f"{method}-{seed}"
        write_run(path, method=method, seed=seed)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["kind"] == "train":
                row["step_seconds"] = step_seconds
            else:
                row["accuracy"] = accuracy - 0.1 * (row["step"] == 50)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if keys:
            with (path / "config.yaml").open("a") as file:
                file.write("optim: {" + ", ".join(keys) + "}\n")
        found.append(runs.read(path))
    return found


def test_over_time_a_slower_method_is_further_to_the_right(tmp_path):
    fast, slow = runs.group([*write(tmp_path, [0.9]), *write(tmp_path, [0.95], method="sam", step_seconds=3.0)])
    assert runs.curve(fast, "validation", "accuracy", by_time=True).x == pytest.approx([50.0, 100.0])
    assert runs.curve(slow, "validation", "accuracy", by_time=True).x == pytest.approx([150.0, 300.0])
    assert runs.curve(slow, "validation", "accuracy").x == [2.5, 5.0]
    # A point of two seeds is at the mean of their times.
    (both,) = runs.group([*fast.runs, *write(tmp_path, [0.9], seeds=[1], step_seconds=2.0)])
    assert runs.curve(both, "validation", "accuracy", by_time=True).x == pytest.approx([75.0, 150.0])
    text = page.page([fast, slow])
    assert text.index("<h3>By time</h3>") < text.index("minutes of training") < text.index("<h3>By epoch</h3>")


def test_what_each_had_reached_in_the_time_of_the_shortest_is_a_column(tmp_path):
    found = runs.group([*write(tmp_path, [0.9]), *write(tmp_path, [0.95], method="sam", step_seconds=2.0)])
    assert groups.columns(found)[4] == "After 1.7 min"
    # SAM has made half of its steps by then.
    assert [row[4] for row in groups.rows(found)] == ["0.9000", "0.8500"]
    assert groups.columns(found[:1]) == [*groups.COLUMNS]


def test_differences_are_students_by_seed_and_marked_where_zero_lies_outside(tmp_path):
    base, other = [0.90, 0.91, 0.92], [0.915, 0.926, 0.934]
    found = runs.group([*write(tmp_path, other, method="sam"), *write(tmp_path, base)])
    (difference,) = groups.differences(found)
    assert (difference.name, difference.reference, difference.is_paired) == ("sam", "sgd", True)
    low, high = ttest_rel(other, base).confidence_interval(0.95)
    assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx((low, high))
    assert difference.is_outside is True
    assert groups.difference_table(found) == [["sam - sgd", "+0.0150 ± 0.0025", "yes"]]


def test_seeds_that_are_not_the_same_are_compared_by_welch(tmp_path):
    base, other = [0.90, 0.91, 0.92], [0.905, 0.93, 0.91, 0.94]
    found = runs.group([*write(tmp_path, base), *write(tmp_path, other, method="sam", seeds=[7, 8, 9, 10])])
    (difference,) = groups.differences(found)
    low, high = ttest_ind(other, base, equal_var=False).confidence_interval(0.95)
    assert not difference.is_paired
    assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx((low, high))
    assert difference.is_outside is False


def test_two_seeds_show_their_values_and_no_verdict(tmp_path):
    found = runs.group([*write(tmp_path, [0.9, 0.92]), *write(tmp_path, [0.93, 0.95], method="sam")])
    assert groups.rows(found)[0][3] == "0.9100 (0.9000, 0.9200)"
    (difference,) = groups.differences(found)
    assert math.isnan(difference.half)
    assert groups.difference_table(found) == [["sam - sgd", "+0.0300", "3 seeds are needed"]]


def test_sharpness_of_methods_that_measure_otherwise_shares_no_axis(tmp_path):
    several = [*write(tmp_path / "a", [0.9], method="sam"), *write(tmp_path / "b", [0.9], method="esam")]
    several += write(tmp_path / "c", [0.9], method="esam", seeds=[1], keys=["lr: 0.5"])
    text = page.page(runs.group(several))
    drawn = re.findall(r"<figcaption>(Rise of the loss[^<]*)</figcaption>(<svg.*?</svg>)", text, re.DOTALL)
    assert [(caption, svg.count("<polyline")) for caption, svg in drawn] == [
        ("Rise of the loss, sam", 1),
        ("Rise of the loss, esam", 2),  # which differ in the rate alone
    ]
    assert "not which network is flatter" in text


def test_folders_without_a_run_are_named_and_passed_over(tmp_path, caplog):
    write(tmp_path, [0.9])
    (tmp_path / "failed").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    broken = write_run(tmp_path / "broken", seed=9).folder
    (broken / "config.yaml").write_text("run: {seed: 1, seed: 2}\n")
    folders = [tmp_path / name for name in ("failed", "notes.txt", "broken", "sgd-0")]
    answer = here("report", *folders)
    assert answer.status == 0, answer.err
    text = (tmp_path / "sgd-0/report.html").read_text()
    for name, reason in (("failed", "holds no rows"), ("notes.txt", "is no folder"), ("broken", "is given twice")):
        assert re.search(f"passed over: .*{name}.*{reason}", caplog.text)
        assert re.search(f"Passed over: [^<]*{name}", text)
    assert here("report", tmp_path / "failed", tmp_path / "notes.txt").status == 2


def test_a_damaged_description_of_the_environment_ends_nothing(tmp_path):
    (run,) = write(tmp_path, [0.9])
    (run.folder / "environment.json").write_text("{")
    assert runs.read(run.folder).environment == {}


def test_the_best_and_the_last_checkpoint_stand_with_the_command_that_exports(tmp_path):
    (run,) = write(tmp_path / "my runs", [0.9])
    assert run.checkpoints == (None, None)
    for step, accuracy in ((50, 0.93), (100, 0.91), (150, None)):
        folder = run.folder / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"step": step, "accuracy": accuracy, "sha256": "x"}))
    text = page.page(runs.group([run]))
    table = text.partition("<h2>Checkpoints</h2>")[2].partition("</table>")[0]
    assert "step 50 (0.9300)" in table
    assert "step 150<" in table
    command = re.search("<code>(.*?)</code>", table)[1].replace("<wbr>", "")
    assert command.endswith("my runs/sgd-0&#x27; --format safetensors")


def test_watch_writes_again_until_ctrl_c(tmp_path, monkeypatch):
    (run,) = write(tmp_path, [0.9])
    out, seen = tmp_path / "page.html", []

    def sleep(seconds):
        seen.append((seconds, '<meta http-equiv="refresh" content="5">' in out.read_text()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        out.write_text("old")

    monkeypatch.setattr("esam_dist.report.command.time.sleep", sleep)
    assert here("report", run.folder, "--out", out, "--watch", 5).status == 0
    assert seen == [(5.0, True), (5.0, True)]
    assert "http-equiv" not in out.read_text()
    assert here("report", run.folder, "--watch", 0).status == 2


def test_columns_are_as_wide_as_they_look():
    accent = unicodedata.normalize("NFD", "é")
    assert in_columns([["一二", "x"], [accent, "y"], ["abc", "z"]]) == f"一二  x\n{accent}     y\nabc   z"


def test_no_page_without_runs(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        runs.read_all([tmp_path, tmp_path / "none"])
