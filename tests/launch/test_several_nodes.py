"""One job over three hosts with addresses of their own: static, elastic, over a bad network, and by deepspeed."""

import json
import sys

import pytest
from hosts import hosts
from servers import ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ["alpha", "beta", "gamma"]


def launch(digits, folder, *options, overrides=()):
    words = ["launch", "--nproc-per-node=1", "--rendezvous=alpha:29500", *options, str(digits / "config.yaml")]
    return [sys.executable, "-m", "esam_dist", *words, f"run.folder={folder / 'run'}", *overrides]


def start(host, command, tmp_path):
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return host.start(command, tmp_path / f"{host.name}.log", env=env, cwd=tmp_path)


def rows(tmp_path, kind="train"):
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def logs(tmp_path):
    return "\n".join((tmp_path / f"{name}.log").read_text() for name in NAMES)


@pytest.mark.parametrize("network", [(), ("delay", "10ms", "5ms", "loss", "1%")], ids=["good", "delay-and-loss"])
def test_torchrun_trains_over_three_hosts(tmp_path, digits, network):
    with hosts(tmp_path, NAMES) as three:
        if network:
            three[2].slow_down(*network)
            assert "delay 10" in three[2].run("tc", "qdisc", "show", "dev", "eth0")
        running = [
            start(
                host,
                launch(digits, tmp_path, "--nnodes=3", f"--node-rank={rank}", overrides=["train.max_steps=12"]),
                tmp_path,
            )
            for rank, host in enumerate(three)
        ]
        assert [process.wait(300) for process in running] == [0, 0, 0], logs(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 12
    assert rows(tmp_path)[-1]["samples"] == 12 * 16 * 3
    assert "[rank 2]" not in (tmp_path / "alpha.log").read_text()


def test_node_with_another_config_is_named_on_every_host(tmp_path, digits):
    with hosts(tmp_path, NAMES) as three:
        running = [
            start(
                host,
                launch(digits, tmp_path, "--nnodes=3", f"--node-rank={rank}", overrides=[f"optim.lr={lr}"]),
                tmp_path,
            )
            for rank, (host, lr) in enumerate(zip(three, (0.1, 0.1, 0.2), strict=True))
        ]
        assert [process.wait(120) for process in running] == [2, 2, 2], logs(tmp_path)
    for name in NAMES:
        assert "node 2 has another config than node 0 (lr: 0.1; lr: 0.2)" in (tmp_path / f"{name}.log").read_text()


def test_elastic_job_goes_on_without_a_crashed_host_and_takes_it_back(tmp_path, digits):
    options = ["--nnodes=2:3", "--max-restarts=10", "--grace=10"]
    overrides = ["checkpoint.every_steps=4", "train.max_steps=100000", "metrics.port=9400"]
    with hosts(tmp_path, NAMES) as three:
        command = launch(digits, tmp_path, *options, overrides=overrides)
        running = [start(host, command, tmp_path) for host in three]

        def samples_per_step():
            done = rows(tmp_path)
            return (
                (done[-1]["samples"] - done[-2]["samples"]) / (done[-1]["step"] - done[-2]["step"])
                if len(done) > 1
                else 0
            )

        until(lambda: samples_per_step() == 48, 400, "three hosts train")
        three[2].crash()
        until(lambda: samples_per_step() == 32, 400, "the other two go on")
        before = rows(tmp_path)[-1]
        assert before["restarts"] >= 1
        start(three[2], command, tmp_path)
        until(lambda: samples_per_step() == 48, 400, "the third is back")
        after = rows(tmp_path)[-1]
        assert after["step"] > before["step"]
        assert after["samples"] > before["samples"]
        steps = [row["step"] for row in rows(tmp_path)]
        assert steps == sorted(set(steps))
        for process in running[:2]:
            process.terminate()
        assert {process.wait(180) for process in running[:2]} == {143}, logs(tmp_path)


def test_deepspeed_trains_over_three_hosts_without_ssh(tmp_path, digits):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    options = ["--with=deepspeed", f"--hostfile={hostfile}", "--no-ssh"]
    overrides = ["train.max_steps=6", "engine.name=deepspeed"]
    with hosts(tmp_path, NAMES) as three:
        running = [
            start(host, launch(digits, tmp_path, *options, f"--node-rank={rank}", overrides=overrides), tmp_path)
            for rank, host in enumerate(three)
        ]
        assert [process.wait(500) for process in running] == [0, 0, 0], logs(tmp_path)
    assert rows(tmp_path)[-1]["samples"] == 6 * 16 * 3
