"""How `esam-dist launch` ends where no rank has run: a signal while it waits, a rendezvous that fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import ROOT, free_ports, started, until
from torch.distributed import DistStoreError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from esam_dist.launch import agent, compose, start
from tests.jobs import job

ALONE = ["unshare", "--pid", "--fork", "--kill-child"]


def command(digits, tmp_path, *options):
    words = ["--nproc-per-node=1", f"--logs={tmp_path / 'logs'}", *options, str(digits / "config.yaml")]
    return [sys.executable, "-m", "esam_dist", "launch", *words, f"run.folder={tmp_path / 'run'}"]


def ends_within_seconds(process, seconds=20):
    begin = time.monotonic()
    status = process.wait(60)
    assert time.monotonic() - begin < seconds
    return status


@pytest.mark.parametrize("options", [["--nnodes=2"], ["--nnodes=2", "--no-checks"], ["--nnodes=1:2", "--no-checks"]])
def test_sigterm_ends_a_launch_that_waits_for_a_node_that_does_not_answer(digits, tmp_path, options):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(120)
        where = [f"--rendezvous=127.0.0.1:{silent.getsockname()[1]}", "--node-rank=1"]
        with started(command(digits, tmp_path, *options, *where), tmp_path / "log", cwd=ROOT) as running:
            connection, _ = silent.accept()
            with connection:
                running.terminate()
                assert ends_within_seconds(running) == 143, (tmp_path / "log").read_text()


@pytest.mark.skipif(
    subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode != 0,
    reason="no process can be process 1 of a namespace here",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launch_that_is_process_1_and_waits_for_other_nodes_ends_at_a_signal(digits, tmp_path, number):
    port = free_ports(1)
    words = command(digits, tmp_path, "--nnodes=2:3", f"--rendezvous=127.0.0.1:{port}")

    def waits():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with started([*ALONE, *words], tmp_path / "log", cwd=ROOT) as running:
        until(waits, 120, "the rendezvous is open")
        first = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        os.kill(int(first), number)
        assert ends_within_seconds(running) == 128 + number, (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RendezvousTimeoutError(), "too few nodes came in time"),
        (RendezvousClosedError(), "another node has ended the job"),
        (RendezvousConnectionError("no answer"), r"this node lost it \(no answer\)"),
        (DistStoreError("wait timeout\nmore"), "wait timeout; start the job again on every node"),
    ],
)
def test_rendezvous_that_fails_is_one_line_and_status_1(monkeypatch, caplog, error, told):
    def fail(arguments):
        raise error

    wanted = job("--nnodes=1:2", "--rendezvous=head:1234")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(agent, "register", lambda: None)
    monkeypatch.setattr(torchrun, "run", fail)
    assert start.start_torchrun(wanted, compose.command(wanted, Path("logs"), {})) == 1
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert record.getMessage().startswith("the rendezvous at head:1234 failed: ")
    assert re.search(told, record.getMessage())


def test_agent_restarts_no_rank_that_ends_with_a_users_mistake(monkeypatch):
    made = object.__new__(agent.Agent)
    failures = {}
    monkeypatch.setattr(
        LocalElasticAgent, "_monitor_workers", lambda self, group: RunResult(WorkerState.FAILED, {}, failures)
    )
    for status, left in ((1, 3), (-9, 3), (2, 0)):
        made._remaining_restarts = 3
        failures[0] = ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file="")
        made._monitor_workers(None)
        assert made._remaining_restarts == left


def test_spare_node_whose_job_is_over_has_succeeded(monkeypatch):
    monkeypatch.setattr(LocalElasticAgent, "run", lambda self, role: None)
    assert not object.__new__(agent.Agent).run().is_failed()


@pytest.mark.parametrize(
    ("returned", "status"),
    [(0, 0), (1, 1), (2, 2), (143, 143), (256 - 9, 128 + 9), (256 - 11, 128 + 11), (255, 255), (-15, 143)],
)
def test_status_of_deepspeeds_runner_is_read_as_it_is_meant(returned, status):
    assert start._status_of_runner(returned) == status


@pytest.mark.slow
def test_the_rank_that_stands_still_is_said_before_the_one_that_failed_of_it(digits, tmp_path):
    """Rank 1 is stopped by the kernel, and can say nothing; rank 0 fails, as it waits."""
    words = command(digits, tmp_path, "--no-checks")
    words[words.index("--nproc-per-node=1")] = "--nproc-per-node=2"
    more = ["engine.collective_timeout_seconds=8", "train.epochs=500", "data.workers=0", "metrics.progress=lines"]
    log = tmp_path / "log"
    with started([*words, *more], log, cwd=ROOT) as running:
        until(lambda: " step " in log.read_text(), 240, "a step")
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        one = next(pid for pid in children if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text())
        os.kill(int(one), signal.SIGSTOP)
        assert running.wait(200) == 1
    text = log.read_text()
    summary = text[text.rindex("no word from rank 1") :]
    assert summary.index("stood still first: rank 0 on ") < summary.index("rank 0 ended with exit status")
