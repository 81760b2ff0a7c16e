"""What the user got wrong, under plain torchrun: said once, again at the end, and all ranks end at once."""

import os
import sys
import time

import pytest
from servers import ROOT, started, until

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "esam_dist"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.folder=/dev/null/run", "run.folder = /dev/null/run: cannot be written"),  # seen by rank 0 alone
        pytest.param("data.path=nowhere", "data.path = nowhere: no such folder", marks=pytest.mark.slow),
        pytest.param(
            "optim.lr=1e30",
            "had a gradient that is not finite (train.max_skipped_updates = 10)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistake_ends_all_ranks_at_once_and_stands_at_the_end(digits, tmp_path, override, line):
    log = tmp_path / "log"
    words = [*TORCHRUN, "train", str(digits / "config.yaml"), f"run.folder={tmp_path / 'run'}", override]
    with started(words, log, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}) as agent:
        until(lambda: line in log.read_text(), 100, "the line is written")
        begin = time.monotonic()
        assert agent.wait(100) != 0
        assert time.monotonic() - begin < 15
    told = [shown for shown in log.read_text().splitlines() if line in shown]
    assert [shown.partition(":")[0].strip() for shown in told] == ["esam-dist", "traceback"], log.read_text()
    assert log.read_text().splitlines()[-2] == told[-1]
    assert told[-1] == f"  traceback : {told[0]}"
