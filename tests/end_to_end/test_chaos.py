"""Campaigns of faults, a short and a longer one: nothing is lost, and what would be lost is found."""

import csv
import subprocess
import sys

import pytest

from tests.commands import environment


def campaign(out, *options):
    command = [sys.executable, "-m", "benchmarks.chaos", f"--out={out / 'out'}", f"--work={out / 'work'}", *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1000, check=False)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_job_that_is_stopped_slowed_and_killed_in_a_save_ends_as_if_nothing_had_been(tmp_path):
    few = ("--faults=3", "--updates=30", "--seed=14", "--configuration=native-2-sam", "--only", "stop", "slow", "write")
    ended = campaign(tmp_path, *few)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    faults, (job,) = rows(tmp_path / "out/faults.csv"), rows(tmp_path / "out/jobs.csv")
    assert {row["kind"] for row in faults} == {"stop", "slow", "write"}
    assert all(row["survived"] == "True" for row in faults)
    assert job["trouble"] == ""


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
