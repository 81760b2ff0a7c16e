"""A bit that flips in the weights of one rank stops the run, by name, before anything of it is saved."""

from __future__ import annotations

import pytest
import torch

from esam_dist import SharpnessAware
from tests.commands import TIMEOUT_SECONDS, on_ranks

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

WHERE = {"native": ["engine.name=native"]} | {
    f"zero{stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in (1, 3)
}


def flip_one_bit_on_rank_1(rank: int) -> None:
    """The lowest, of one weight (under ZeRO 3, where no rank holds weights whole, of a statistic), behind update 6."""
    made = SharpnessAware.step

    def step(self: SharpnessAware, *args: object, **keys: object) -> object:
        stats = made(self, *args, **keys)
        if rank == 1 and self.updates == 6:
            network = self.engine.module
            whole = [param for param in network.parameters() if not hasattr(param, "ds_tensor")]
            floats = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
            bits = (whole or floats)[-1].detach().view(-1).view(torch.int32)
            bits[0] ^= 1
        return stats

    SharpnessAware.step = step


@pytest.mark.parametrize(
    ("engine", "count", "keys", "found_at"),
    [
        # Looked for in every update, and only before a checkpoint: three ranks end an epoch, validate and save at 7.
        ("native", 2, ["train.check_replicas_every=1"], 6),
        ("native", 3, ["train.log_every=100"], 7),
        pytest.param("zero1", 3, ["train.check_replicas_every=1"], 6, marks=pytest.mark.slow),
        pytest.param("zero3", 2, ["train.check_replicas_every=1"], 6, marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_found_named_and_not_saved(tiny, tmp_path, engine, count, keys, found_at) -> None:
    run = ("train", tiny, *WHERE[engine], f"run.folder={tmp_path / 'run'}", "checkpoint.every_steps=5", *keys)
    if engine == "zero3":
        run = (*run, "method.name=sam")
    answers = on_ranks(*run, count=count, first=flip_one_bit_on_rank_1)
    assert [answer.status for answer in answers] == [2] * count
    err = answers[0].err
    who = (
        "the weights of rank 1 differ from those of the other 2 ranks"
        if count == 3
        else "the weights of rank 0 and rank 1 differ, and no majority tells which are right"
    )
    assert f"{who} at step {found_at}: " in err
    assert f"goes on from {tmp_path}/run/checkpoints/step_00000005, the last sound checkpoint" in err
    assert "Traceback" not in err
    assert max(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == "step_00000005"
    if count == 3:
        assert "this is rank 1, on " in answers[1].err
