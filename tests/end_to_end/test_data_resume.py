"""A job on three ranks is killed in mid-epoch and goes on with two: every sample is read that was left, each once."""

import subprocess
import sys
from pathlib import Path

from esam_dist.data.dataset import open_split
from esam_dist.data.order import Order
from tests.commands import environment

COMMAND = Path(__file__).with_name("recorded_command.py")
BATCH = 16


def launch(ranks: int, record: Path, *args: object, **env: str) -> int:
    record.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(COMMAND), "train", *map(str, args)]
    return subprocess.run(
        command, env=environment(RECORD=str(record), **env), capture_output=True, text=True, timeout=150, check=False
    ).returncode


def read_in_step_order(record: Path, ranks: int) -> list[list[int]]:
    """What all ranks read together, one list for each step that all of them began."""
    lines = [(record / f"rank{rank}").read_text().splitlines() for rank in range(ranks)]
    steps = zip(*lines, strict=False)
    return [[int(sample) for line in step for sample in line.split()] for step in steps]


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
    assert launch(3, tmp_path / "first", tiny, *overrides, DIE_AT="1 10") != 0
    assert launch(2, tmp_path / "second", tiny, *overrides) == 0

    first = read_in_step_order(tmp_path / "first", 3)
    second = read_in_step_order(tmp_path / "second", 2)
    assert len(first) == 10
    kept = [sample for step in first[:8] for sample in step]  # up to the last checkpoint
    going_on = [sample for step in second for sample in step]
    split = open_split(digits, "train")
    expected = Order(0, split.counts, 16).draw(0, len(kept) + len(going_on)).ids.tolist()
    assert kept + going_on == expected
    epoch = kept + going_on[: split.num_samples - len(kept)]
    assert sorted(epoch) == list(range(split.num_samples))
    # The run ends with the first update that completes the epoch.
    assert 0 <= len(kept) + len(going_on) - split.num_samples < 2 * BATCH
