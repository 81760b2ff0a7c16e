"""Nothing is left behind, however a run ends: no process, no shared memory, no temporary file."""

import json
import signal
from pathlib import Path

import psutil
import pytest
from test_orphans import TORCHRUN, is_rank, rows, training

SECONDS = 30


def first_rank(below):
    """A rank itself, not one of its loaders."""
    return next(process for process in below if is_rank(process) and not is_rank(process.parent()))


def taken_over(agent, below, run):
    holder = json.loads((run / "run.lock").read_text()) | {"pid": 1, "host": "another", "token": "another"}
    (run / "run.lock").write_text(json.dumps(holder))


ENDS = {
    "normal": lambda agent, below, run: None,
    "error": taken_over,
    "sigterm": lambda agent, below, run: agent.terminate(),
    "ctrl-c": lambda agent, below, run: [agent.send_signal(signal.SIGINT), *(p.send_signal(2) for p in below)],
    "rank killed": lambda agent, below, run: first_rank(below).kill(),
    "agent killed": lambda agent, below, run: agent.kill(),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(digits, tmp_path, end):
    temporary, run = tmp_path / "tmp", tmp_path / "run"
    temporary.mkdir()
    overrides = ["data.workers=2", "checkpoint.every_steps=2", f"train.max_steps={40 if end == 'normal' else 100000}"]
    with training(TORCHRUN, digits, tmp_path, *overrides, env={"TMPDIR": str(temporary)}) as (agent, below):
        processes = [psutil.Process(agent.pid), *below]
        assert len(list(filter(is_rank, below))) >= 6, "two ranks and their loaders"
        ENDS[end](agent, below, run)
        left = psutil.wait_procs(processes, SECONDS)[1]
        log = (tmp_path / "log").read_text()[-3000:]
        assert not left, log
    shared = [
        path.name for path in Path("/dev/shm").iterdir() if any(str(process.pid) in path.name for process in processes)
    ]
    assert shared == []
    assert [str(path.relative_to(tmp_path)) for path in temporary.rglob("*") if not path.is_dir()] == []
    if "killed" not in end:
        assert [path.name for path in run.rglob(".*")] == []
    if end == "normal":
        assert rows(tmp_path)[-1]["step"] == 40
