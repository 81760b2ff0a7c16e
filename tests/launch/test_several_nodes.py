"""One job over three hosts with addresses of their own: static, elastic, over a bad network, and by deepspeed."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest
from bad_network import round_trip_seconds, slowed
from hosts import hosts
from servers import ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ["alpha", "beta", "gamma"]


def launch(digits, folder, *options, overrides=()):
    # A hostfile says itself how many ranks a host has.
    size = [] if any(option.startswith("--hostfile") for option in options) else ["--nproc-per-node=1"]
    words = ["launch", *size, "--rendezvous=alpha:29500", *options, str(digits / "config.yaml")]
    return [sys.executable, "-m", "esam_dist", *words, f"run.folder={folder / 'run'}", *overrides]


def script(name, digits, folder, overrides=(), **variables):
    """One of the plain scripts in launch/ with its variables."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "HEAD": "alpha", "RANKS_PER_NODE": "1", "LOGS": folder / "logs"} | variables
    settings = [f"{name}={value}" for name, value in variables.items()]
    words = [str(digits / "config.yaml"), f"run.folder={folder / 'run'}", *overrides]
    return ["env", *settings, str(ROOT / "launch" / name), *words]


def start(host, command, tmp_path):
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return host.start(command, tmp_path / f"{host.name}.log", env=env, cwd=tmp_path)


def rows(tmp_path, kind="train"):
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def logs(tmp_path):
    return "\n".join((tmp_path / f"{name}.log").read_text() for name in NAMES)


def train_twelve_steps(three, tmp_path, command):
    running = [start(host, command(rank), tmp_path) for rank, host in enumerate(three)]
    assert [process.wait(300) for process in running] == [0, 0, 0], logs(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 12
    assert rows(tmp_path)[-1]["samples"] == 12 * 16 * 3


TWELVE = ["train.max_steps=12"]


def by_launch(digits, tmp_path):
    return lambda rank: launch(digits, tmp_path, "--nnodes=3", f"--node-rank={rank}", overrides=TWELVE)


def by_script(digits, tmp_path):
    return lambda rank: script("torchrun/several_nodes.sh", digits, tmp_path, TWELVE, NODES=3, NODE_RANK=rank)


@pytest.mark.parametrize("by", [by_launch, by_script])
def test_torchrun_trains_over_three_hosts(tmp_path, digits, by):
    with hosts(tmp_path, NAMES) as three:
        train_twelve_steps(three, tmp_path, by(digits, tmp_path))
    assert "[rank 2]" not in (tmp_path / "alpha.log").read_text()


def test_torchrun_trains_over_a_network_that_is_late_and_loses_frames(tmp_path, digits):
    with hosts(tmp_path, NAMES) as three:
        assert round_trip_seconds(three[0], three[2]) < 0.005
        with slowed(three[2], delay_ms=10, jitter_ms=5, loss_percent=1) as loss:
            assert round_trip_seconds(three[0], three[2]) > 0.008
            train_twelve_steps(three, tmp_path, by_launch(digits, tmp_path))
    assert loss.dropped > 10


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


def samples_per_step(tmp_path):
    done = rows(tmp_path)
    if len(done) < 2:
        return 0
    return (done[-1]["samples"] - done[-2]["samples"]) / (done[-1]["step"] - done[-2]["step"])


def assert_no_step_is_missing_or_twice(tmp_path):
    done = rows(tmp_path)
    for before, after in itertools.pairwise(done):
        steps, samples = after["step"] - before["step"], after["samples"] - before["samples"]
        assert steps > 0
        # a row may lie across a change between two and three ranks only at its beginning, where a checkpoint is
        assert samples in (32 * steps, 48 * steps), (before, after)


def stop(running, tmp_path, status=143):
    for process in running:
        process.terminate()
    assert {process.wait(180) for process in running} == {status}, logs(tmp_path)


ELASTIC = ["--nnodes=2:3", "--max-restarts=10", "--grace=10"]
WITHOUT_END = ["checkpoint.every_steps=4", "train.max_steps=100000", "metrics.port=9400"]


def elastic_by_launch(digits, tmp_path):
    return launch(digits, tmp_path, *ELASTIC, overrides=WITHOUT_END)


def elastic_by_script(digits, tmp_path):
    return script("torchrun/elastic.sh", digits, tmp_path, WITHOUT_END, NODES="2:3", JOB="digits", RESTARTS=10)


# torchrun alone says 1 for every signal
@pytest.mark.parametrize(("by", "status"), [(elastic_by_launch, 143), (elastic_by_script, 1)])
def test_elastic_job_goes_on_without_a_crashed_host_and_takes_it_back(tmp_path, digits, by, status):
    with hosts(tmp_path, NAMES) as three:
        command = by(digits, tmp_path)
        running = [start(host, command, tmp_path) for host in three]
        until(lambda: samples_per_step(tmp_path) == 48, 400, "three hosts train")
        three[2].crash()
        until(lambda: samples_per_step(tmp_path) == 32, 400, "the other two go on")
        before = rows(tmp_path)[-1]
        assert before["restarts"] >= 1
        running[2] = start(three[2], command, tmp_path)
        until(lambda: samples_per_step(tmp_path) == 48, 400, "the third is back")
        assert rows(tmp_path)[-1]["step"] > before["step"]
        stop(running, tmp_path, status)
    assert_no_step_is_missing_or_twice(tmp_path)


def test_elastic_job_goes_on_without_a_host_that_is_cut_off_and_takes_it_back(tmp_path, digits):
    overrides = [*WITHOUT_END, "engine.collective_timeout_seconds=20"]
    with hosts(tmp_path, NAMES) as three:
        command = launch(digits, tmp_path, *ELASTIC, overrides=overrides)
        running = [start(host, command, tmp_path) for host in three]
        until(lambda: samples_per_step(tmp_path) == 48, 400, "three hosts train")

        three[2].cut_off()
        time.sleep(3)
        before = rows(tmp_path)[-1]["step"]
        three[2].reconnect()
        until(lambda: rows(tmp_path)[-1]["step"] > before + 4, 60, "an interruption below the timeout is survived")
        assert rows(tmp_path)[-1]["restarts"] == 0

        three[2].cut_off()
        time.sleep(3)
        last_checkpoint = max((tmp_path / "run/checkpoints").iterdir())
        until(lambda: samples_per_step(tmp_path) == 32, 400, "the other two go on")
        assert rows(tmp_path)[-1]["restarts"] == 1
        assert f"continuing from {last_checkpoint}" in (tmp_path / "alpha.log").read_text()
        assert running[2].wait(120) == 1, logs(tmp_path)
        assert "the rendezvous at alpha:29500 failed: this node lost it" in (tmp_path / "gamma.log").read_text()

        three[2].reconnect()
        running[2] = start(three[2], command, tmp_path)
        until(lambda: samples_per_step(tmp_path) == 48, 400, "the third is back")
        assert rows(tmp_path)[-1]["restarts"] == 2
        stop(running, tmp_path)
    assert_no_step_is_missing_or_twice(tmp_path)


def deepspeed_by_launch(digits, tmp_path, hostfile, rank):
    options = ["--with=deepspeed", f"--hostfile={hostfile}", "--no-ssh", f"--node-rank={rank}"]
    return launch(digits, tmp_path, *options, overrides=DEEPSPEED)


def deepspeed_by_script(digits, tmp_path, hostfile, rank):
    return script("deepspeed/no_ssh.sh", digits, tmp_path, DEEPSPEED, HOSTFILE=hostfile, NODE_RANK=rank)


DEEPSPEED = ["train.max_steps=6", "engine.name=deepspeed"]


@pytest.mark.parametrize("by", [deepspeed_by_launch, deepspeed_by_script])
def test_deepspeed_trains_over_three_hosts_without_ssh(tmp_path, digits, by):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    with hosts(tmp_path, NAMES) as three:
        running = [start(host, by(digits, tmp_path, hostfile, rank), tmp_path) for rank, host in enumerate(three)]
        assert [process.wait(500) for process in running] == [0, 0, 0], logs(tmp_path)
    assert rows(tmp_path)[-1]["samples"] == 6 * 16 * 3
