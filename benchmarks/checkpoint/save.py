"""One checkpoint of a network in a process of its own: prints for how long training would have stood still.

    python -m benchmarks.checkpoint.save STATE HOW FOLDER

Also run with an older tree of this package in PYTHONPATH, whose saves are all synchronous (`HOW` = before).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from esam_dist.checkpoint import Checkpoints
from esam_dist.engine.native import NativeEngine
from esam_dist.ranks import Ranks

STATES = {"resnet50": "SGD with momentum", "vit_l_16": "AdamW"}


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and an optimizer that has all its state, as after an update."""
    with torch.device("meta"):
        network = models.get_model(name)
    network = network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.detach().fill_(1)
    params = list(network.parameters())
    if STATES[name] == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params)
        kept: dict[str, Any] = {"step": torch.tensor(1.0), "exp_avg": None, "exp_avg_sq": None}
    else:
        optimizer, kept = torch.optim.SGD(params, momentum=0.9), {"momentum_buffer": None}
    for param in params:
        optimizer.state[param] = {
            key: torch.full_like(param, 1e-3, requires_grad=False) if value is None else value.clone()
            for key, value in kept.items()
        }
    return network, optimizer


def main(name: str, how: str, folder: str) -> None:
    """Save once, and print the seconds of standstill and of the whole, and the bytes on the disk."""
    torch.set_num_threads(1)
    network, optimizer = trained(name)
    engine = NativeEngine(network, optimizer, Ranks())
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
    start = time.perf_counter()
    whole = {"engine": engine.state_dict(), "train": {"step": 1, "samples_seen": 1}}
    copied = time.perf_counter() - start
    if how == "asynchronous":
        from esam_dist.checkpoint import Writer

        writer = Writer(checkpoints)
        writer.begin(whole, 1, None)
        stall = time.perf_counter() - start
        del whole
        writer.wait()
        outcome = writer.next_ended()
        assert outcome is not None
        assert outcome.error is None, outcome.error
    else:
        checkpoints.save(whole, 1)
        stall = time.perf_counter() - start
    seconds = time.perf_counter() - start
    size = (checkpoints.folder / "step_00000001" / "state.pt").stat().st_size
    print(json.dumps({"copy_seconds": copied, "stall_seconds": stall, "whole_seconds": seconds, "bytes": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
