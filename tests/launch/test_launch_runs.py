"""`esam-dist launch` on this machine: real ranks under torchrun and deepspeed."""

import json
import subprocess
import sys

import pytest
from servers import ROOT, started, until


def command(digits, *words):
    return [
        sys.executable,
        "-m",
        "esam_dist",
        "launch",
        "--nproc-per-node=2",
        *words[:-1],
        str(digits / "config.yaml"),
        *words[-1],
    ]


def test_status_of_a_failing_rank_is_the_status_of_the_launch(digits, tmp_path):
    overrides = [f"data.path={tmp_path / 'nowhere'}", f"run.folder={tmp_path / 'run'}"]
    words = command(digits, "--no-checks", f"--logs={tmp_path / 'logs'}", overrides)
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "[rank 0] esam-dist: error:" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    assert set(logs) == {"0", "1"}
    assert "nowhere" in logs["0"]


def test_rank_with_loader_processes_stops_with_a_checkpoint(digits, tmp_path):
    overrides = [f"run.folder={tmp_path / 'run'}", "data.workers=2", "train.max_steps=100000"]
    words = command(digits, f"--logs={tmp_path / 'logs'}", overrides)
    shown = tmp_path / "shown.log"
    with started(words, shown, cwd=ROOT) as running:
        until(lambda: " step 6/" in shown.read_text(), 200, "six updates are shown")
        running.terminate()
        assert running.wait(120) == 143, shown.read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / f"run/checkpoints/step_{max(row['step'] for row in rows):08d}").is_dir(), shown.read_text()[
        -3000:
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_job_shows_its_ranks_and_stops_with_a_checkpoint(digits, tmp_path):
    overrides = [f"run.folder={tmp_path / 'run'}", "engine.name=deepspeed", "train.max_steps=100000"]
    words = command(digits, "--with=deepspeed", f"--logs={tmp_path / 'logs'}", overrides)
    shown = tmp_path / "shown.log"
    with started(words, shown, cwd=ROOT) as running:
        until(lambda: "[rank 0]" in shown.read_text() and " step 6/" in shown.read_text(), 600, "six updates are shown")
        running.terminate()
        assert running.wait(120) == 143, shown.read_text()[-3000:]
    assert len(list((tmp_path / "logs").glob("*_rank[01].log"))) == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows if row["kind"] == "train")
    assert (tmp_path / f"run/checkpoints/step_{last:08d}").is_dir()
