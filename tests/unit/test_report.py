"""The report: what is read, how seeds are put together, what the page says."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.report import chart, groups, page, runs
from esam_dist.report.command import summary


def write_run(folder, *, method="esam", seed=0, offset=0.0, restarts=0, note="x", torch="2.14.1"):
    folder.mkdir(parents=True)
    settings = {"run": {"seed": seed, "folder": str(folder)}, "method": {"name": method}, "data": {"path": note}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = {"versions": {"torch": torch, "python": "3.11"}, "git": None, "command": ["esam-dist", "a=<b>"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = []
    for step in range(10, 110, 10):
        row = {"kind": "train", "step": step, "epoch": step / 20, "loss": 2.0 / step + offset, "lr": 0.1}
        row |= {"grad_norm": 1.0, "sharpness": None if step == 50 else 0.1, "kept_fraction": 0.5}
        row |= {"images_per_second": 100.0, "step_seconds": 0.36, "restarts": restarts if step > 50 else 0}
        row |= {"skipped_updates": 2} if step == 70 else {}
        row |= {"phases": {"ascent": 0.1, "descent": 0.2}}
        rows.append(row)
        if step % 50 == 0:
            rows.append({"kind": "validation", "step": step, "epoch": step / 20, "accuracy": 0.9 + offset, "loss": 0.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.read(folder)


def test_seeds_of_one_method_are_one_group_and_methods_are_told_apart(tmp_path):
    several = [write_run(tmp_path / f"{m}{s}", method=m, seed=s) for m in ("sgd", "esam") for s in (0, 1)]
    found = runs.group(several)
    assert [(group.name, len(group.runs)) for group in found] == [("sgd", 2), ("esam", 2)]


def test_interval_is_students():
    assert runs.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4841377))
    mean, half = runs.interval([1.5, 2.5])
    assert mean == 2.0
    assert math.isnan(half)


def test_curve_is_the_mean_over_seeds_and_leaves_out_what_was_not_measured(tmp_path):
    (group,) = runs.group([write_run(tmp_path / str(s), seed=s, offset=s * 0.02) for s in (0, 1, 2)])
    loss = runs.curve(group, "train", "loss")
    assert loss.x[0] == 0.5
    assert loss.y[0] == pytest.approx(0.22)
    assert loss.half[0] == pytest.approx(0.02 * 2.4841377)
    assert 2.5 not in runs.curve(group, "train", "sharpness").x


def test_summary_names_accuracy_with_its_interval_and_the_restarts(tmp_path):
    found = runs.group([write_run(tmp_path / str(s), seed=s, offset=s * 0.02, restarts=s) for s in (0, 1, 2)])
    (row,) = groups.rows(found)
    assert dict(zip(groups.columns(found), row, strict=True)) == {
        "Runs": "0",
        "Seeds": "0, 1, 2",
        "Best accuracy": "0.9200 ± 0.0497",
        "Last accuracy": "0.9200 ± 0.0497",
        "Validation loss": "0.3000 ± 0.0000",
        "Images/s": "100",
        "Training time": "0.6 min",
        "Restarts": "2",
        "Skipped updates": "6",
    }
    assert summary(found).splitlines()[1].startswith("0     0, 1, 2")


def test_page_needs_nothing_from_elsewhere_and_runs_no_script(tmp_path):
    text = page.page(runs.group([write_run(tmp_path / m, method=m) for m in ("sgd", "esam")]))
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?:", text)
    assert text.count("<polyline") >= 2 * 7


def test_every_chart_is_well_formed_svg(tmp_path):
    text = page.page(runs.group([write_run(tmp_path / "one", restarts=2)]))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 9
    for drawing in drawings:
        ET.fromstring(drawing)
    assert "nan" not in "".join(drawings)
    assert "<title>restart</title>" in text


def test_seconds_of_every_phase_stand_in_a_table(tmp_path):
    text = page.page(runs.group([write_run(tmp_path / m, method=m) for m in ("sgd", "esam")]))
    table = next(part for part in text.split("<table>") if ">Seconds<" in part)
    assert re.findall(r"<th.*?>(\w+)</th>", table) == ["Seconds", "ascent", "descent"]
    for name in ("sgd", "esam"):
        assert f"<td>{name}</td><td class=number>0.1000</td><td class=number>0.2000</td>" in table


def test_what_users_write_is_shown_as_text(tmp_path):
    text = page.page(runs.group([write_run(tmp_path / "a&b", note="<script>alert(1)</script>")]))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a&amp;b" in text


def test_settings_that_differ_stand_out(tmp_path):
    text = page.page(runs.group([write_run(tmp_path / m, method=m) for m in ("sgd", "esam")]))
    differing = re.findall(r'<tr class="differs"><td class="key">([^<]*)</td><td class="config">(.*?)</td>', text)
    assert differing == [("method.name", "<span>sgd <small>sgd</small></span><span>esam <small>esam</small></span>")]


def test_environments_are_shown_and_what_differs_stands_out(tmp_path):
    one, other = (write_run(tmp_path / name, seed=i) for i, name in enumerate(("one", "other")))
    alone = page.page(runs.group([one])).partition("<h2>Environment</h2>")[2]
    for key, value in (("versions: torch", "2.14.1"), ("git", "None"), ("command", "esam-dist a=<wbr>&lt;b&gt;")):
        kind = "<td><code>" if key == "command" else '<td class="config">'
        assert f"{kind}{value}<" in alone
        assert (f'<td class="key">{key}</td>' in alone) == (key != "command")
    both = page.page(runs.group([one, other])).partition("<h2>Environment</h2>")[2]
    assert "Nothing differs." in both
    assert "The same in all runs: 3 values" in both
    assert 'class="differs"' not in both
    newer = write_run(tmp_path / "newer", seed=2, torch="2.15.0")
    both = page.page(runs.group([one, newer])).partition("<h2>Environment</h2>")[2]
    assert re.findall(r'<tr class="differs"><td class="key">([^<]*)</td><td class="config">(.*?)</td></tr>', both) == [
        ("versions: torch", "<span>2.14.1 <small>one</small></span><span>2.15.0 <small>newer</small></span>")
    ]
    assert "The same in all runs: 2 values" in both


def test_run_without_a_description_says_so(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/environment.json").unlink()
    text = page.page(runs.group([runs.read(tmp_path / "run")]))
    assert text.partition("<h2>Environment</h2>")[2].startswith("<p>Not reported.</p>")


def test_run_that_has_only_begun_is_reported_without_curves(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "checkpoint", "step": 0, "seconds": 0.1}\n')
    found = runs.group([runs.read(folder)])
    assert "Not reported." in page.page(found)
    assert groups.rows(found)[0][2] == "-"


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no rows in metrics.jsonl; give the folder of a run"):
        runs.read(Path(tmp_path))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.83, 0.97, [0.85, 0.9, 0.95]),
        (-2.0, 13.0, [0.0, 5.0, 10.0]),
        (1e-5, 4e-5, [1e-5, 2e-5, 3e-5, 4e-5]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert chart.ticks(low, high) == pytest.approx(expected)


def test_run_of_a_version_with_fewer_keys_belongs_to_its_method(tmp_path):
    old, new = (write_run(tmp_path / name, seed=i) for i, name in enumerate(("old", "new")))
    path = tmp_path / "new/config.yaml"
    values = config.Config().model_dump(mode="json")
    values["run"]["seed"], values["data"]["path"] = 1, "x"
    path.write_text(yaml.safe_dump(values))
    assert len(runs.group([old, runs.read(tmp_path / "new")])) == 1
    assert new.seed == "1"
