"""Rules, dashboard and exposition, checked with Prometheus' own tool and against the names that the code exposes."""

import json
import re
import subprocess

import yaml
from prometheus_client import generate_latest
from servers import ROOT, tool

from esam_dist.metrics import Metrics, TrainRow, ValidationRow
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.metrics.prometheus import names
from esam_dist.metrics.sinks import PUSHED_JOB
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks

RULES = ROOT / "launch/prometheus/rules.yaml"
DASHBOARD = ROOT / "launch/grafana/dashboard.json"
WORDS = re.compile(r"(?<!\")\b(?:esam[_:]|process_)[a-z0-9_:]+")


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def known_names():
    histogram = {f"esam_phase_seconds_{suffix}" for suffix in ("bucket", "sum", "count")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return set(names()) | histogram | recorded | {"process_resident_memory_bytes"}


def dashboard_expressions():
    board = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return panels + [entry["expr"] for entry in board["annotations"]["list"]]


def promtool(*arguments, **kwargs):
    done = subprocess.run(
        [tool("promtool"), *arguments], check=False, capture_output=True, text=True, timeout=60, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def filled_registry(tmp_path):
    run_info = {"model": "cifar_resnet8"}
    metrics = Metrics(tmp_path, MetricsKeys(), Ranks(), run_info, Progress(planned_steps=10))
    numbers = dict.fromkeys([*("epoch", "loss", "lr", "grad_norm", "sharpness", "kept_fraction"), "rho", "beta"], 0.5)
    numbers |= dict.fromkeys(["gamma", "selection_threshold", "images_per_second", "step_seconds"], 0.5)
    row = TrainRow(
        step=1, **numbers, data_wait_seconds=0.1, samples=8, kept_samples=4, skipped_samples={"undecodable": 1}
    )
    metrics.progress(1)
    metrics.train(row)
    metrics.validation(ValidationRow(1, 0.5, 0.5, 0.9, 1.0, 0.1, averaged_accuracy=0.5))
    metrics.checkpoint_saved(1, 0.1)
    metrics.close()
    return metrics.registry


def test_rules_are_accepted_and_fire_when_they_should():
    promtool("check", "rules", str(RULES))
    promtool("test", "rules", "rules_test.yaml", cwd=RULES.parent)
    promtool("check", "config", "prometheus.yaml", cwd=RULES.parent)


def test_every_alert_has_a_test_in_which_it_fires():
    groups = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())["tests"]
    cases = [case for group in groups for case in group.get("alert_rule_test", [])]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    quiet = {case["alertname"] for case in cases if not case["exp_alerts"]}
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert fired == quiet == alerts


def test_exposition_passes_the_linter_with_every_metric_present(tmp_path):
    page = generate_latest(filled_registry(tmp_path)).decode()
    exposed = set(re.findall(r"^# HELP (\S+)", page, re.MULTILINE))
    assert set(names()) <= exposed
    promtool("check", "metrics", input=page)


def test_rules_and_dashboard_use_only_names_that_exist():
    for expression in [rule["expr"] for rule in rules()] + dashboard_expressions():
        used = set(WORDS.findall(expression))
        assert used, f"no metric in {expression}"
        assert used <= known_names(), expression


def test_rules_leave_out_what_a_gateway_shows_for_ever():
    for rule in rules():
        selected = re.findall(r"(?:esam|push)_\w+(\{[^}]*\})?", rule["expr"])
        live = [f'job!="{PUSHED_JOB}"' in (labels or "") for labels in selected]
        pushed = [f'job="{PUSHED_JOB}"' in (labels or "") for labels in selected]
        assert all(map(any, zip(live, pushed, strict=True))), rule["expr"]
        assert not any(pushed) or rule["alert"] == "EsamLossNotFinite"


def test_every_metric_is_on_the_dashboard():
    shown = set(WORDS.findall("\n".join(dashboard_expressions())))
    through_rules = set(WORDS.findall("\n".join(rule["expr"] for rule in rules() if rule.get("record") in shown)))
    histogram = {"esam_phase_seconds"} if "esam_phase_seconds_bucket" in shown else set()
    alerts_only = {"esam_start_timestamp_seconds"}
    assert set(names()) - shown - through_rules - histogram == alerts_only


def test_dashboard_expressions_are_promql(tmp_path):
    entries = [{"record": f"check:{i}", "expr": text} for i, text in enumerate(dashboard_expressions())]
    path = tmp_path / "dashboard-rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": entries}]}))
    assert f"{len(entries)} rules found" in promtool("check", "rules", str(path))


def test_dashboard_panels_do_not_overlap_and_have_unique_ids():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        box = panel["gridPos"]
        own = {(box["x"] + i, box["y"] + j) for i in range(box["w"]) for j in range(box["h"])}
        assert box["x"] + box["w"] <= 24
        assert not cells & own, panel["title"]
        cells |= own


def test_dashboard_asks_the_data_source_that_its_user_chooses():
    board = json.loads(DASHBOARD.read_text())
    variables = {entry["name"]: entry for entry in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    chosen = {"type": variables["datasource"]["query"], "uid": "${datasource}"}
    assert variables["run"]["datasource"] == chosen
    used = set()
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == chosen, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in {"short", "percentunit", "s", "bytes"}, panel["title"]
        targets = panel["targets"]
        assert len({target["refId"] for target in targets}) == len(targets) > 0, panel["title"]
        assert all(target["datasource"] == chosen for target in targets), panel["title"]
        used |= {name for target in targets for name in re.findall(r"\$(\w+)", target["expr"])}
    assert used == set(variables) - {"datasource"}


def test_documentation_lists_every_metric_and_every_alert():
    text = (ROOT / "docs/operations.md").read_text()
    assert set(names()) == set(re.findall(r"^\| `(esam_\w+)`", text, re.MULTILINE))
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert alerts == set(re.findall(r"^\| (Esam\w+)", text, re.MULTILINE))


def test_documentation_names_tests_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    named = set(re.findall(r"test_\w+\.py", text))
    assert "test_several_nodes.py" in named
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
