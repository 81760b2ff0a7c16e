"""The health of two real ranks, of which one stands still."""

import os
import signal
import sys
from contextlib import ExitStack

import pytest
from servers import ROOT, fetch, free_ports, started, until


@pytest.fixture
def two_ranks(tmp_path, digits):
    """The processes of a run without end on two ranks, with no launcher to look after them, and their addresses."""
    meeting, base = free_ports(1), free_ports(2)
    overrides = [f"run.folder={tmp_path / 'run'}", "train.max_steps=100000", "train.validate_every=10000"]
    overrides += [f"metrics.port={base}", "metrics.stall_seconds=3"]
    command = [sys.executable, "-m", "esam_dist", "train", str(digits / "config.yaml"), *overrides]
    with ExitStack() as stack:
        running = []
        for rank in ("0", "1"):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)}
            process = started(command, tmp_path / f"{rank}.log", cwd=ROOT, env=os.environ | env)
            running.append(stack.enter_context(process))
        yield running, [f"http://127.0.0.1:{base + rank}" for rank in range(2)]


@pytest.mark.slow
def test_a_rank_that_stands_still_makes_the_other_unhealthy_until_it_goes_on(two_ranks, tmp_path):
    (first, second), (url, silent) = two_ranks
    until(lambda: fetch(f"{url}/readyz")[0] == fetch(f"{silent}/readyz")[0] == 200, 120, "both ranks are ready")
    try:
        second.send_signal(signal.SIGSTOP)
        assert fetch(f"{url}/healthz")[0] == 200
        until(lambda: fetch(f"{url}/healthz")[0] == 503, 30, "rank 0 waits in a collective")
        assert fetch(f"{url}/readyz")[0] == 503
        assert fetch(f"{url}/metrics")[0] == 200
        assert fetch(f"{silent}/healthz", timeout=1)[0] == 0
    finally:
        second.send_signal(signal.SIGCONT)
    until(lambda: fetch(f"{url}/healthz")[0] == fetch(f"{silent}/healthz")[0] == 200, 30, "both go on")
    first.terminate()
    assert [process.wait(60) for process in (first, second)] == [143, 143], (tmp_path / "0.log").read_text()
