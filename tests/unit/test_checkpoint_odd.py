"""Checkpoints whose checksum is right and whose contents are not: one line, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esam_dist import config, soundness
from esam_dist.averaging import WeightAverage
from esam_dist.checkpoint import Checkpoints
from esam_dist.errors import UserError
from esam_dist.progress import Progress
from esam_dist.resume import find_state


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def state() -> dict[str, Any]:
    """A sound one."""
    module = network()
    average = WeightAverage(module, "ema")
    average.update(1)
    average.note_statistics(module)
    params = dict(module.named_parameters())
    return {
        "engine": {
            "model": {name: value.clone() for name, value in module.state_dict().items()},
            "optimizer": {name: {"momentum_buffer": torch.zeros_like(param)} for name, param in params.items()},
        },
        "train": Progress(step=4, samples=32).saved(),
        "method": {"flat": [torch.zeros_like(param) for param in params.values()]},
        "average": average.state_dict(),
    }


def changed(place: str, value: Any) -> dict[str, Any]:
    """With `value` at `a.b.c`."""
    made: Any = state()
    *tables, last = place.split("/")
    table = made
    for key in tables:
        table = table[int(key) if key.isdigit() else key]
    table[int(last) if last.isdigit() else last] = value
    return made


def nested(depth: int) -> Any:
    value: Any = 0.0
    for _ in range(depth):
        value = [value]
    return value


LONG = torch.zeros(3, dtype=torch.int64)
ODD = [
    *(
        ("average", 1e308),
        ("average", {"kind": "ema"}),
        ("average/copies", 3.0),
        ("average/copies/0", [torch.zeros(3)]),
    ),
    *(("average/updates", "text"), ("average/updates", 10**30), ("average/statistics", None), ("average/kind", 5)),
    *(("average/copies/0/0.bias", torch.zeros(4)), ("average/copies/0/0.bias", LONG), ("average/copies/0/x", LONG)),
    *(("average/statistics/1.running_mean", torch.zeros(4)), ("average/statistics/x", torch.zeros(3))),
    *(("method", [1]), ("method/flat", "text"), ("method/flat", [torch.zeros(3)]), ("method/flat/0", torch.zeros(3))),
    *(("method/flat/0", None), ("method/more", {"a": torch.zeros(3)}), ("train/step", 10**30)),
    *(("train/sharp_updates", "text"), ("train/skipped_in_a_row", -1), ("train/samples_seen", None)),
    *(("engine/model/0.bias", LONG), ("engine/model/0.bias", torch.zeros(3, dtype=torch.complex64))),
    *(("engine/model/0.bias", torch.zeros(3).to_sparse()), ("engine/model/0.bias", torch.zeros(3, device="meta"))),
    ("engine/optimizer/0.bias/momentum_buffer", LONG),
]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(("place", "value"), ODD, ids=[f"{place}-{number}" for number, (place, _) in enumerate(ODD)])
def test_an_odd_value_is_refused_in_one_line(tmp_path, place: str, value: Any) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    cfg = config.parse({"run": {"folder": str(tmp_path)}, "train": {"average": "ema"}}, "test")
    checkpoints.save(state(), 4)
    assert find_state(cfg, checkpoints, network()) is not None
    made = changed(place, value)
    # As a checkpoint that was sealed so: none that is not finite is written by us.
    unsound, soundness.unsound = soundness.unsound, lambda _: None
    try:
        path = checkpoints.save(made, 4)
    finally:
        soundness.unsound = unsound
    with pytest.raises(UserError) as caught:
        find_state(cfg, checkpoints, network())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "none of the 1 checkpoints" in str(caught.value)


def test_a_state_that_is_nested_without_end_is_refused() -> None:
    # Pickle can hold it: it reads without calling itself.
    assert soundness.fault(changed("engine/more", nested(5000))) == "is nested deeper than any state is"


def test_an_earlier_version_without_some_parts_is_taken(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    cfg = config.parse({"run": {"folder": str(tmp_path)}}, "test")
    made = state()
    del made["average"], made["method"], made["train"]["sharp_updates"], made["train"]["skipped_in_a_row"]
    checkpoints.save(made, 4)
    assert find_state(cfg, checkpoints, network()) is not None
