"""Ranks whose launcher is killed end within seconds, with a checkpoint if they can; those that wait to meet, too."""

import contextlib
import json
import os
import signal
import socket
import sys

import psutil
import pytest
from servers import ROOT, free_ports, started, until

SECONDS = 10
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "esam_dist", "train"]
LAUNCH = [*PYTHON, "esam_dist", "launch", "--nproc-per-node=2"]


@contextlib.contextmanager
def training(command, digits, tmp_path, *overrides, env=None):
    """Two ranks that train under `command`: its process, and all below it."""
    words = [*command, str(digits / "config.yaml"), f"run.folder={tmp_path / 'run'}", "train.max_steps=100000"]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    with started([*words, *overrides], tmp_path / "log", cwd=tmp_path, env=env) as agent:
        until(lambda: len(rows(tmp_path)) > 2, 200, f"it trains: {(tmp_path / 'log').read_text()}")
        below = psutil.Process(agent.pid).children(recursive=True)
        try:
            yield agent, below
        finally:
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def rows(tmp_path):
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def is_rank(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return "RANK" in process.environ()
    return False


def assert_stopped_in_order(below, tmp_path):
    left = psutil.wait_procs(below, SECONDS)[1]
    assert not left, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / f"run/checkpoints/step_{rows(tmp_path)[-1]['step']:08d}").is_dir()
    assert any("is gone: stopping" in path.read_text() for path in [tmp_path / "log", *tmp_path.rglob("*stderr.log")])


def test_ranks_and_their_loaders_end_with_a_checkpoint_when_torchrun_is_killed(digits, tmp_path):
    with training(TORCHRUN, digits, tmp_path, "data.workers=1") as (agent, below):
        assert len(list(filter(is_rank, below))) >= 4, "two ranks and their loaders"
        agent.kill()
        assert_stopped_in_order(below, tmp_path)


@pytest.mark.slow
def test_ranks_end_with_a_checkpoint_when_launch_is_killed(digits, tmp_path):
    with training(LAUNCH, digits, tmp_path) as (agent, below):
        agent.kill()
        assert_stopped_in_order(below, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("killed", ["launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch"])
@pytest.mark.slow
def test_ranks_end_with_a_checkpoint_when_one_of_deepspeeds_launchers_is_killed(digits, tmp_path, killed):
    options = ["--with=deepspeed", f"--rendezvous=127.0.0.1:{free_ports(1)}", f"--logs={tmp_path}"]
    with training([*LAUNCH, *options], digits, tmp_path, "engine.name=deepspeed") as (agent, below):
        chain = [psutil.Process(agent.pid), *below]
        ranks = list(filter(is_rank, below))
        next(process for process in chain if killed in process.cmdline()).kill()
        left = psutil.wait_procs(ranks, SECONDS)[1]
        assert not left
        assert (tmp_path / f"run/checkpoints/step_{rows(tmp_path)[-1]['step']:08d}").is_dir()


@pytest.mark.slow
def test_rank_that_waits_in_a_collective_ends_after_the_launchers_patience(digits, tmp_path):
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    with training(TORCHRUN, digits, tmp_path, env=patience) as (agent, below):
        first, second = sorted(filter(is_rank, below), key=lambda rank: rank.environ()["RANK"])
        second.suspend()
        agent.kill()
        assert psutil.wait_procs([first], SECONDS)[0]


@contextlib.contextmanager
def alone_of_two(digits, tmp_path, *program):
    """Rank 0 of a job whose rank 1 never comes, below a shell that stands for its launcher: both processes."""
    port = free_ports(1)
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [*(program or ("-m", "esam_dist")), "train", str(digits / "config.yaml"), f"run.folder={tmp_path / 'run'}"]
    shell = ["sh", "-c", '"$@" & wait $!', "sh", sys.executable, *words]
    with started(shell, tmp_path / "log", cwd=ROOT, env=os.environ | env) as launcher:

        def waits():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        if not program:
            until(waits, 120, "the rank waits for the other")
        (rank,) = until(psutil.Process(launcher.pid).children, 20, "the rank is started")
        try:
            yield launcher, rank
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


@pytest.mark.slow
def test_rank_that_waits_for_another_ends_when_its_launcher_is_killed(digits, tmp_path):
    with alone_of_two(digits, tmp_path) as (launcher, rank):
        launcher.kill()
        assert psutil.wait_procs([rank], SECONDS)[0], (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_rank_that_waits_for_another_ends_at_a_signal(digits, tmp_path, number):
    with alone_of_two(digits, tmp_path) as (launcher, rank):
        rank.send_signal(number)
        assert launcher.wait(SECONDS) == 128 + number, (tmp_path / "log").read_text()


@pytest.mark.slow
def test_launcher_that_is_killed_while_python_imports_torch_is_missed_afterwards(digits, tmp_path):
    noted = tmp_path / "noted"
    program = (
        "import os, pathlib, sys, time; from esam_dist import launch; parent = os.getppid()\n"
        f"pathlib.Path({str(noted)!r}).touch()\n"
        "while os.getppid() == parent: time.sleep(0.1)\n"
        "from esam_dist.cli import program; program()"
    )
    with alone_of_two(digits, tmp_path, "-c", program) as (launcher, rank):
        until(noted.exists, 60, "the rank has noted its launcher")
        launcher.kill()
        launcher.wait()
        assert psutil.wait_procs([rank], 60)[0]
