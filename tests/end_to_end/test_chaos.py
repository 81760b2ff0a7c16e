"""Campaigns of faults, a short and a longer one: nothing is lost, and what would be lost is found."""

import csv
import json
import subprocess
import sys

import pytest

from benchmarks.chaos.__main__ import main as chaos
from benchmarks.chaos.checks import digests
from benchmarks.chaos.configurations import Configuration, prepare
from tests.commands import environment, here

SEED = 162
"""A schedule of one of each."""


def campaign(out, *options):
    command = [sys.executable, "-m", "benchmarks.chaos", f"--out={out / 'out'}", f"--work={out / 'work'}", *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1000, check=False)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_job_that_is_stopped_slowed_and_killed_in_a_save_ends_as_if_nothing_had_been(tmp_path):
    """One rank under `launch`, against a run in this process."""
    configuration, out = Configuration.named("native-1-sam"), tmp_path / "out"
    prepare(tmp_path / "work/data")
    config = tmp_path / "alone.yaml"
    config.write_text(configuration.text(tmp_path / "work/data", tmp_path / "alone", 22))
    assert here("train", config).status == 0
    undisturbed = digests(tmp_path / "alone/checkpoints/step_00000022")._asdict() | {"seconds": 1, "step_seconds": 0.01}
    out.mkdir()
    (out / "undisturbed.json").write_text(json.dumps({configuration.name: undisturbed}))
    few = ("--faults=3", "--updates=22", f"--seed={SEED}", "--configurations", configuration.name, "--continue")
    assert chaos([*few, "--only", "stop", "slow", "write", f"--out={out}", f"--work={tmp_path / 'work'}"]) == 0
    (job,) = rows(out / "jobs.csv")
    assert job["trouble"] == ""
    assert job["weights"] == undisturbed["weights"][:16]
    struck = rows(out / "faults.csv")
    assert sorted(row["kind"] for row in struck) == ["slow", "stop", "write"]
    assert all(row["survived"] == "True" for row in struck)


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_thirty_faults_of_every_kind_that_is_possible_here_lose_nothing_and_a_campaign_goes_on(tmp_path):
    assert campaign(tmp_path, "--faults=15", "--jobs=2", "--updates=120").returncode == 0
    before = rows(tmp_path / "out/jobs.csv")
    ended = campaign(tmp_path, "--faults=30", "--jobs=2", "--updates=120", "--continue")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    jobs, faults = rows(tmp_path / "out/jobs.csv"), rows(tmp_path / "out/faults.csv")
    assert jobs[: len(before)] == before
    assert len({row["job"] for row in jobs}) == len(jobs)
    assert len(faults) >= 30
    assert len({row["kind"] for row in faults}) > 6
