"""A real Prometheus server and a real Pushgateway, watching a real two-rank run."""

import json
import sys

import pytest
import yaml
from servers import ROOT, fetch, free_ports, query, started, tool, until

from esam_dist.metrics.prometheus import names

DASHBOARD = json.loads((ROOT / "launch/grafana/dashboard.json").read_text())
SPEED = {"EsamDataStarvation", "EsamRankSkew"}  # depend on what else the machine does


def train(tmp_path, digits, *overrides, ranks=2):
    launch = ["launch", f"--nproc-per-node={ranks}", f"--logs={tmp_path / 'logs'}", str(digits / "config.yaml")]
    return [sys.executable, "-m", "esam_dist", *launch, f"run.folder={tmp_path / 'run'}", *overrides]


def prometheus(tmp_path, port, targets, gateway_port=None):
    """The command of a server that scrapes every half second, with the project's own rules, which wait for nothing."""
    rules = yaml.safe_load((ROOT / "launch/prometheus/rules.yaml").read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    cfg = yaml.safe_load((ROOT / "launch/prometheus/prometheus.yaml").read_text())
    cfg["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
    cfg["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    cfg["scrape_configs"][1]["static_configs"][0]["targets"] = [f"127.0.0.1:{gateway_port}"] if gateway_port else []
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(cfg))
    files = [f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    return [tool("prometheus"), *files, f"--web.listen-address=127.0.0.1:{port}"]


def firing(port):
    return {entry["metric"]["alertname"] for entry in query(port, 'ALERTS{alertstate="firing"}')}


def dashboard_values(port):
    """Check that every panel of the dashboard shows something of the run `digits`."""
    for expression in [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]:
        assert query(port, expression.replace("$run", "digits|run")), f"empty panel: {expression}"


def test_server_scrapes_both_ranks_evaluates_the_rules_and_fills_the_dashboard(tmp_path, digits):
    base, port = free_ports(2), free_ports(1)
    targets = [f"127.0.0.1:{base + rank}" for rank in range(2)]
    server = prometheus(tmp_path, port, targets)
    job = train(tmp_path, digits, f"metrics.port={base}", "train.max_steps=100000", "checkpoint.every_steps=5")
    with started(server, tmp_path / "prometheus.log"), started(job, tmp_path / "job.log", cwd=ROOT) as running:
        until(lambda: fetch(f"http://127.0.0.1:{base + 1}/readyz")[0] == 200, 90, "rank 1 is ready")
        until(lambda: query(port, "esam:images_per_second:rate5m > 0"), 60, "the recording rules have values")
        both = "count(esam_validation_best_epoch) == 2 and count(esam_checkpoint_last_step) == 2"
        until(lambda: query(port, both), 60, "both ranks report a validation and a checkpoint")
        ranks = query(port, 'count by (rank) (esam_phase_seconds_bucket{run="digits", phase="ascent"})')
        assert {entry["metric"]["rank"] for entry in ranks} == {"0", "1"}
        for name in names():
            suffix = "_count" if name == "esam_phase_seconds" else ""
            assert query(port, f"count(count by (instance) ({name}{suffix})) == 2"), f"{name} is not on both ranks"
        dashboard_values(port)
        (loss,) = query(port, "max by (run) (esam_train_loss)")
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert float(loss["value"][1]) in {row["loss"] for row in rows if row["kind"] == "train"}
        alerts = json.loads(fetch(f"http://127.0.0.1:{port}/api/v1/rules?type=alert")[1])["data"]["groups"]
        assert {rule["health"] for group in alerts for rule in group["rules"]} == {"ok"}
        assert firing(port) <= SPEED
        running.terminate()
        assert running.wait(60) == 143
        until(lambda: "EsamEndedEarly" in firing(port), 30, "the end before the last update is an alert")
        assert firing(port) <= SPEED | {"EsamEndedEarly"}
    assert any((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.slow
def test_final_values_of_a_short_job_survive_in_the_pushgateway(tmp_path, digits):
    gateway_port, port = free_ports(1), free_ports(1)
    gateway = [tool("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{gateway_port}"]
    overrides = ["train.max_steps=4", f"metrics.gateway=http://127.0.0.1:{gateway_port}"]
    server = prometheus(tmp_path, port, [], gateway_port)
    with started(gateway, tmp_path / "gateway.log"), started(server, tmp_path / "prometheus.log"):
        until(lambda: fetch(f"http://127.0.0.1:{gateway_port}/-/ready")[0] == 200, 30, "the gateway is ready")
        with started(train(tmp_path, digits, *overrides), tmp_path / "job.log", cwd=ROOT) as running:
            assert running.wait(120) == 0, (tmp_path / "job.log").read_text()
        until(lambda: len(query(port, 'esam_step{run="run"} == 4')) == 2, 30, "Prometheus has both ranks' last step")
        (accuracy,) = query(port, 'max(esam_validation_accuracy{job="esam_pushed"})')
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert float(accuracy["value"][1]) == rows[-2]["accuracy"]
        assert not firing(port)


@pytest.mark.slow
def test_a_pushed_loss_that_is_not_finite_fires_beside_a_live_run_whose_dashboard_stays_whole(tmp_path, digits):
    gateway_port, port, base = free_ports(1), free_ports(1), free_ports(2)
    gateway = [tool("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{gateway_port}"]
    server = prometheus(tmp_path, port, [f"127.0.0.1:{base + rank}" for rank in range(2)], gateway_port)
    push = f"metrics.gateway=http://127.0.0.1:{gateway_port}"
    (tmp_path / "bad").mkdir()
    bad = train(tmp_path / "bad", digits, push, "optim.lr=1e30", "optim.warmup_epochs=0", "train.max_steps=100")
    live = train(tmp_path, digits, f"metrics.port={base}", "train.max_steps=100000", "checkpoint.every_steps=5")
    with started(gateway, tmp_path / "gateway.log"), started(server, tmp_path / "prometheus.log"):
        until(lambda: fetch(f"http://127.0.0.1:{gateway_port}/-/ready")[0] == 200, 30, "the gateway is ready")
        with started(bad, tmp_path / "bad.log", cwd=ROOT) as running:
            assert running.wait(120) == 2, (tmp_path / "bad.log").read_text()
        until(lambda: firing(port) == {"EsamLossNotFinite"}, 30, "only the loss is an alert")
        with started(live, tmp_path / "live.log", cwd=ROOT) as running:
            both = "count(esam_validation_best_epoch) == 2 and count(esam_checkpoint_last_step) == 2"
            until(lambda: query(port, both), 120, "both ranks report a validation and a checkpoint")
            until(lambda: query(port, "esam:images_per_second:rate5m > 0"), 60, "the recording rules have values")
            dashboard_values(port)
            bad_loss = query(port, 'max by (run) (1 - (abs(esam_train_loss{run=~"run"}) < bool Inf))')
            assert [entry["value"][1] for entry in bad_loss] == ["1"]
            memory = [panel for panel in DASHBOARD["panels"] if panel["title"].startswith("Host memory")]
            found = query(port, memory[0]["targets"][0]["expr"].replace("$run", "digits|run"))
            assert {entry["metric"]["rank"] for entry in found} == {"0", "1"}
            running.terminate()
            assert running.wait(60) == 143
