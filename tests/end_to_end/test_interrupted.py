"""What comes between a run and its folder: kills in the middle of a save, a second job, a full disk."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from esam_dist import cli
from esam_dist.checkpoint import read
from tests.commands import TIMEOUT_SECONDS, environment, here, on_ranks, rows, wait_for

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

SHORT = ("train.epochs=2", "checkpoint.every_steps=5")
"""20 steps of one rank."""
CLOCK = {"images_per_second", "step_seconds", "data_wait_seconds", "phases", "time", "seconds", "restarts"}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """20 steps of one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert here("train", tiny, f"run.folder={folder}", *SHORT).status == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed_on_two(tiny, tmp_path_factory):
    """20 steps of two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed_on_two")
    answers = on_ranks("train", tiny, f"run.folder={folder}", "checkpoint.every_steps=5")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    return folder


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def assert_the_same_run(folder, undisturbed):
    """Weights, momentum and rows are equal to the last bit."""
    final = "checkpoints/step_00000020"
    assert same(read(folder / final), read(undisturbed / final))
    both = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (folder, undisturbed)]
    kept = [[{key: row[key] for key in row.keys() - CLOCK} for row in run] for run in both]
    for run in kept:
        # A checkpoint is reported when it is complete, which may be a few updates later.
        run.sort(key=lambda row: (row["step"], row["kind"]))
    assert kept[0] == kept[1]
    names = [{path.name for path in (run / "checkpoints").iterdir()} for run in (folder, undisturbed)]
    assert names[0] == names[1]


def killed_in_save(launcher, place, folder, tiny, *overrides):
    """Run `launcher` with ranks that die while they save step 10."""
    command = [*launcher, str(Path(__file__).with_name("die_in_save.py")), "train", str(tiny), f"run.folder={folder}"]
    env = environment(DIE_WHEN=f"10 {place}", MARK=str(folder.parent / "mark"))
    return subprocess.run(
        [*command, *overrides], env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


@pytest.mark.parametrize(
    "place",
    ["half", *(pytest.param(place, marks=pytest.mark.slow) for place in ("checksum", "metadata", "rename", "renamed"))],
)
def test_20_steps_killed_in_the_middle_of_a_save_continue_to_the_bit(undisturbed, tiny, tmp_path, place):
    folder = tmp_path / "run"
    ended = killed_in_save([sys.executable], place, folder, tiny, *SHORT)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "mark").exists()
    left = "step_00000010" if place == "renamed" else ".partial_step_00000010"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_00000005", left}
    assert here("train", tiny, f"run.folder={folder}", *SHORT).status == 0
    assert_the_same_run(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["prune", "pruned half"])
def test_20_steps_killed_while_an_old_checkpoint_is_dropped_continue_to_the_bit(undisturbed, tiny, tmp_path, place):
    folder, keep = tmp_path / "run", "checkpoint.keep=1"
    ended = killed_in_save([sys.executable], place, folder, tiny, *SHORT, keep)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_00000010", ".partial_step_00000005"}
    assert here("train", tiny, f"run.folder={folder}", *SHORT, keep).status == 0
    final = "checkpoints/step_00000020"
    assert same(read(folder / final), read(undisturbed / final))
    assert not list(folder.glob("checkpoints/.*"))


@pytest.mark.slow
def test_torchrun_starts_two_ranks_again_at_once_after_a_kill_in_a_save(undisturbed_on_two, tiny, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "run"
    # Where rank 1 is ready first, gloo may still be told the killed rank's address. That start fails: hence several.
    ended = killed_in_save([*launcher, "--max-restarts=3"], "half", folder, tiny, "checkpoint.every_steps=5")
    assert ended.returncode == 0, ended.stderr
    assert "is gone" in ended.stderr
    assert 2 <= json.loads((folder / "history.json").read_text())["starts"] <= 4
    assert_the_same_run(folder, undisturbed_on_two)
    assert not (folder / "run.lock").exists()


def test_a_second_job_in_the_folder_is_refused_by_host_and_process_and_harms_nothing(tiny, tmp_path):
    long = ("train.epochs=10000", "train.validate_every=10000", "checkpoint.every_steps=2")
    command = [sys.executable, "-m", "esam_dist", "train", str(tiny), f"run.folder={tmp_path / 'run'}", *long]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            wait_for(lambda: list(tmp_path.glob("run/checkpoints/step_*")))
            second = here("train", tiny, f"run.folder={tmp_path / 'run'}", *long)
            assert second.status == 2
            assert second.err.count("\n") == 1
            assert f"process {first.pid} on {os.uname().nodename} trains there" in second.err
            assert "choose another run.folder" in second.err
            before = rows(tmp_path / "run")[-1]["step"]
            wait_for(lambda: rows(tmp_path / "run")[-1]["step"] > before + 4)
            first.terminate()
            assert first.wait(TIMEOUT_SECONDS) == 143, (tmp_path / "log").read_text()
        finally:
            first.kill()
            first.wait()
    assert json.loads((tmp_path / "run/history.json").read_text())["starts"] == 1
    assert not (tmp_path / "run/run.lock").exists()


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: not root, or a container without the right")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path):
    """Leave no room on the disk of `path`."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def test_a_disk_that_is_full_for_a_while_ends_no_run(undisturbed, tiny, tmp_path, monkeypatch, caplog):
    """Full at steps 10 and 15, with room again at step 20."""
    save = cli.Checkpoints.save

    def save_on_a_changing_disk(checkpoints, state, step, *given):
        ballast = checkpoints.folder.parent.parent / "ballast"
        if step == 10:
            fill(ballast)
        if step == 20:
            ballast.unlink()
        return save(checkpoints, state, step, *given)

    monkeypatch.setattr(cli.Checkpoints, "save", save_on_a_changing_disk)
    with small_disk(tmp_path / "disk", "8m") as disk:
        assert here("train", tiny, f"run.folder={disk / 'run'}", *SHORT).status == 0
        lines = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
        refused = [line for line in lines if line.startswith("checkpoint of step")]
        assert [line.split(":")[0] for line in refused] == ["checkpoint of step 10", "checkpoint of step 15"]
        assert all("No space left on device" in line and "tried again" in line for line in refused)
        final = "checkpoints/step_00000020"
        assert same(read(disk / "run" / final), read(undisturbed / final))
        assert [row["step"] for row in rows(disk / "run")] == list(range(1, 21))
        assert [row["step"] for row in rows(disk / "run", "checkpoint_failed")] == [10, 15]
        assert {path.name for path in (disk / "run/checkpoints").iterdir()} == {"step_00000005", "step_00000020"}


def test_a_last_checkpoint_that_cannot_be_written_is_one_line_and_status_2(tiny, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        assert here("train", tiny, f"run.folder={disk / 'run'}", *SHORT, "train.max_steps=5").status == 0
        stay = shutil.disk_usage(disk).free - 150_000
        (disk / "ballast").write_bytes(bytes(stay))
        ended = here("train", tiny, f"run.folder={disk / 'run'}", *SHORT, "train.max_steps=7")
        assert ended.status == 2
        assert re.fullmatch(
            r"esam-dist: error: checkpoint of step 7: cannot be written .*No space left.*step_00000005\n", ended.err
        )
        (disk / "ballast").unlink()
        assert here("train", tiny, f"run.folder={disk / 'run'}", *SHORT, "train.max_steps=7").status == 0


def test_on_two_ranks_both_go_on_without_a_checkpoint_and_both_end_without_the_last(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    run = ("train", tiny, f"run.folder={tmp_path / 'run'}", "train.epochs=1", "checkpoint.every_steps=2")

    def put_a_file_in_place_of_the_folder(pids):
        # Seen to be empty at the start, and in the way from the first checkpoint on.
        wait_for((tmp_path / "run/metrics.jsonl").exists)
        (tmp_path / "run/checkpoints").write_text("")

    answers = on_ranks(*run, meanwhile=put_a_file_in_place_of_the_folder)
    assert [answer.status for answer in answers] == [2, 2], answers[0].err
    assert "checkpoint of step 5: cannot be written" in answers[0].err.splitlines()[-1]
    assert "rank 1: checkpoint of step 5: cannot be written" in answers[1].err.splitlines()[-1]
    assert [row["step"] for row in rows(tmp_path / "run", "checkpoint_failed")] == [2, 4, 5]


def test_a_continued_run_does_not_keep_the_checkpoint_in_memory(undisturbed, tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    train, held = cli.train, []

    def look_around(*args):
        gc.collect()
        held.extend(thing for thing in gc.get_objects() if type(thing) is dict and {"engine", "train"} <= thing.keys())
        return train(*args)

    monkeypatch.setattr(cli, "train", look_around)
    assert here("train", tiny, f"run.folder={folder}", *SHORT, "train.epochs=3").status == 0
    # Of this run's checkpoint: other tests of this process may have left theirs.
    whole = [thing for thing in held if isinstance(thing["engine"], dict) and "optimizer" in thing["engine"]]
    assert [thing for thing in whole if thing["train"]["step"] == 20] == []


def test_evaluate_scores_the_newest_sound_checkpoint(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "checkpoints/step_00000020/metadata.json").unlink()
    answer = here("evaluate", folder, "--checkpoint", "newest")
    assert answer.status == 0
    assert "step_00000015: accuracy" in answer.out
    assert "step_00000010: accuracy" in here("evaluate", folder, "--checkpoint", "step_00000010").out
