"""A job on three ranks is killed in mid-epoch and goes on with two: every sample is read that was left, each once."""

import subprocess
import sys
from pathlib import Path

import pytest

from esam_dist.data.dataset import open_split
from esam_dist.data.order import Order
from tests.commands import environment

COMMAND = Path(__file__).with_name("recorded_command.py")
BATCH = 16


def launch(ranks: int, record: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    record.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(COMMAND), "train", *map(str, args)]
    return subprocess.run(
        command, env=environment(RECORD=str(record), **env), capture_output=True, text=True, timeout=150, check=False
    )


def trained_on(record: Path, rank: int) -> list[list[int]]:
    """The samples of each batch that a rank has taken."""
    lines = [list(map(int, line.split())) for line in (record / f"drawn{rank}").read_text().splitlines()]
    drawn = {number: ids for number, *ids in lines}
    return [drawn[int(number)] for number in (record / f"taken{rank}").read_text().split()]


def in_step_order(record: Path, ranks: int) -> list[list[int]]:
    """What all ranks trained on together, one list for each step that all of them began."""
    steps = zip(*(trained_on(record, rank) for rank in range(ranks)), strict=False)
    return [[sample for batch in step for sample in batch] for step in steps]


@pytest.mark.slow
def test_a_job_killed_on_three_ranks_goes_on_with_two_where_its_checkpoint_was(digits, tiny, tmp_path):
    overrides = [
        f"run.folder={tmp_path / 'run'}",
        f"data.path={digits}",
        "train.epochs=1",
        "train.max_steps=0",
        "train.log_every=20",
        f"data.batch_size={BATCH}",
        "data.image_size=8",
        "checkpoint.every_steps=4",
        "method.name=sgd",
    ]
    killed = launch(3, tmp_path / "first", tiny, *overrides, DIE_AT="1 10")
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-5000:]
    resumed = launch(2, tmp_path / "second", tiny, *overrides, "data.workers=2")
    assert resumed.returncode == 0, resumed.stderr[-5000:]

    first = in_step_order(tmp_path / "first", 3)
    second = in_step_order(tmp_path / "second", 2)
    assert len(first) == 10, killed.stderr[-5000:]
    kept = [sample for step in first[:8] for sample in step]  # up to the last checkpoint
    going_on = [sample for step in second for sample in step]
    split = open_split(digits, "train")
    expected = Order(0, split.counts, 16).picks(0, len(kept) + len(going_on)).ids.tolist()
    assert kept + going_on == expected
    epoch = kept + going_on[: split.num_samples - len(kept)]
    assert sorted(epoch) == list(range(split.num_samples))
    # The run ends with the first update that completes the epoch.
    assert 0 <= len(kept) + len(going_on) - split.num_samples < 2 * BATCH
