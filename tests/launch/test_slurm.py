"""The script that `esam-dist launch --with slurm` prints, submitted to a real Slurm of two nodes."""

import json
import subprocess
import sys

import pytest
from cluster import cluster
from servers import ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(slurm, digits, folder, *overrides, options=(), sbatch=()):
    """The number of a job of two nodes, a rank each, submitted in the new folder `folder`."""
    folder.mkdir(exist_ok=True)
    words = ["launch", "--with=slurm", "--nnodes=2", "--nproc-per-node=1", *options, str(digits / "config.yaml")]
    command = [sys.executable, "-m", "esam_dist", *words, "run.folder=run", *overrides]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    (folder / "job.sbatch").write_text(printed.stdout)
    return slurm.submit(folder / "job.sbatch", folder, *sbatch)


def rows(folder, kind="train"):
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def newest_checkpoint(folder):
    return max(int(path.name.partition("_")[2]) for path in (folder / "run/checkpoints").iterdir())


def log(folder):
    return "\n".join(path.read_text() for path in folder.glob("esam-*.log"))


def test_job_trains_on_two_nodes(slurm, digits, tmp_path):
    job = submit(
        slurm, digits, tmp_path, "train.max_steps=8", options=["--sbatch=--cpus-per-task=2", "--max-restarts=1"]
    )
    facts = slurm.wait(job, "COMPLETED", "FAILED")
    assert facts["ExitCode"] == "0:0", log(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 8
    assert rows(tmp_path)[-1]["samples"] == 8 * 16 * 2
    assert "[rank 0] " in log(tmp_path)


def test_status_of_a_user_error_is_the_status_of_the_job(slurm, digits, tmp_path):
    job = submit(slurm, digits, tmp_path, "data.path=nowhere")
    facts = slurm.wait(job, "FAILED", "COMPLETED")
    assert facts["ExitCode"] == "2:0", log(tmp_path)
    assert facts["Restarts"] == "0"
    assert "esam-dist: error: data.path = nowhere: no data there" in log(tmp_path)


def test_status_of_a_node_that_fails_is_not_hidden_by_those_it_takes_along(slurm, digits, tmp_path):
    stub = tmp_path / "bin/python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || {{ sleep 5; exit 7; }}\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{slurm.environment()['PATH']}"
    job = submit(slurm, digits, tmp_path, sbatch=[f"--export=ALL,PATH={path}"])
    facts = slurm.wait(job, "FAILED", "COMPLETED", seconds=120)
    assert facts["ExitCode"] == "7:0", log(tmp_path)
    assert facts["Restarts"] == "0"


def test_preempted_job_writes_a_checkpoint_and_goes_on_from_there(slurm, digits, tmp_path):
    low, high = tmp_path / "low", tmp_path / "high"
    job = submit(slurm, digits, low, "train.max_steps=100000")
    until(lambda: len(rows(low)) > 3, 200, "the low job trains")
    urgent = submit(
        slurm, digits, high, "train.max_steps=4", options=["--sbatch=--partition=high", "--sbatch=--exclusive"]
    )
    assert slurm.wait(urgent, "COMPLETED", "FAILED")["ExitCode"] == "0:0", log(high) + log(low)
    kept = newest_checkpoint(low)
    assert rows(low)[-1]["step"] == kept
    until(lambda: rows(low)[-1]["step"] > kept, 200, "the low job is queued again, and goes on")
    assert slurm.facts(job)["Restarts"] == "1"
    assert rows(low)[-1]["restarts"] == 1
    steps = [row["step"] for row in rows(low)]
    assert steps == sorted(set(steps))

    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    until(lambda: newest_checkpoint(low) == rows(low)[-1]["step"], 60, "a cancelled job writes a checkpoint too")
    assert slurm.facts(job)["Restarts"] == "1"


def test_job_that_must_not_be_queued_again_ends_with_143(slurm, digits, tmp_path):
    job = submit(slurm, digits, tmp_path, "train.max_steps=100000", options=["--sbatch=--no-requeue"])
    until(lambda: len(rows(tmp_path)) > 3, 200, "the job trains")
    slurm.run("scancel", "--signal=TERM", job)
    assert slurm.wait(job, "FAILED", "COMPLETED", "CANCELLED")["ExitCode"] == "143:0", log(tmp_path)
    assert newest_checkpoint(tmp_path) == rows(tmp_path)[-1]["step"]
    assert "sbatch this file to go on" in log(tmp_path)
