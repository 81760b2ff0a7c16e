"""A run's checkpoints: the first byte says whether the rest is metadata, the state as it lies on the disk, or changes
to a sound state, whose checksum then fits.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esam_dist import config
from esam_dist.averaging import WeightAverage
from esam_dist.checkpoint import Checkpoints
from esam_dist.engine import MicroBatches, build_engine
from esam_dist.errors import UserError
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from esam_dist.resume import check_memory, check_network, fit_optimizer
from esam_dist.step import MethodState

ODD: tuple[Callable[[], Any], ...] = (
    *(lambda: None, lambda: -1, lambda: 10**30, lambda: math.nan, lambda: True, lambda: "text", lambda: 1e308),
    *(list, dict, lambda: [1, [2]], lambda: {"a": {"b": 1}}, lambda: {1: 2}),
    *(
        lambda: torch.zeros(()),
        lambda: torch.zeros(0),
        lambda: torch.zeros(2, 3),
        lambda: torch.full((3, 2), torch.nan),
    ),
    *(lambda: torch.zeros(3, 2, dtype=torch.int64), lambda: torch.zeros(3, 2, dtype=torch.bool)),
    *(lambda: torch.zeros(3, 2, dtype=torch.complex64), lambda: torch.zeros(3, 2).to_sparse()),
    *(lambda: torch.zeros(3, 2, dtype=torch.float64), lambda: torch.zeros(3, 2, device="meta")),
)
"""What a place in a state may be made into."""


class CheckpointTarget:
    """See the module. What is taken is loaded into an engine, a method's memory and an average."""

    allowed = (UserError,)
    modules = ("checkpoint.py", "soundness.py", "resume.py", "averaging.py", "engine/state.py")
    memory_bytes = 1 << 29

    def __init__(self, folder: Path) -> None:
        self._path = folder / "checkpoints" / "step_00000004"
        self._path.mkdir(parents=True, exist_ok=True)
        self._cfg = config.parse({"train": {"average": "ema"}}, "fuzz")
        self._module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        batches = MicroBatches.of(8, self._cfg.train, self._cfg.method)
        self._engine = build_engine(self._module, Ranks(), self._cfg.optim, self._cfg.engine, batches)
        self._average = WeightAverage(self._module, "ema", decay=0.9, last=1, every=1)
        loss = self._engine(torch.ones(2, 2)).sum()
        self._engine.backward(loss)
        self._engine.step(0.1)
        self._average.update(1)
        self._whole = _bytes_of(self._state())

    def seeds(self) -> list[bytes]:
        """A sound checkpoint, by each of the three ways, and one change of every place."""
        metadata = json.dumps({"step": 4, "accuracy": 0.5, "sha256": hashlib.sha256(self._whole).hexdigest()})
        count = len(list(_places(self._state())))
        changes = [bytes([2, place, place % len(ODD)]) for place in range(count)]
        return [b"\0" + metadata.encode(), b"\1" + self._whole, b"\2", *changes]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        kind, body = (data[0] if data else 0) % 3, data[1:]
        state = {0: self._whole, 1: body}.get(kind) if kind < 2 else _bytes_of(_changed(self._state(), body))
        (self._path / "state.pt").write_bytes(state)
        sealed = json.dumps({"step": 4, "accuracy": 0.5, "sha256": hashlib.sha256(state).hexdigest()}).encode()
        (self._path / "metadata.json").write_bytes(body if kind == 0 else sealed)
        checkpoints = Checkpoints(self._path.parent, keep=1)
        checkpoints.best()
        found = checkpoints.newest()
        assert found is not None
        path, saved = found
        check_network(path, saved, self._cfg, self._module)
        fit_optimizer(path, saved, self._cfg, self._module)
        check_memory(path, saved, self._module)
        Progress.of(saved["train"])
        self._engine.load_state_dict(saved["engine"])
        MethodState(self._module).load_state_dict(saved.get("method", {}))
        self._average.load_state_dict(saved.get("average", {}))

    def _state(self) -> dict[str, Any]:
        torch.manual_seed(0)
        return {
            "engine": self._engine.state_dict(),
            "train": Progress(step=4, samples=32).saved(),
            "method": {},
            "average": self._average.state_dict(),
        }


def _bytes_of(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _places(state: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a state: the table that holds it, and its key."""
    if isinstance(state, dict):
        for key, value in list(state.items()):
            yield state, key
            yield from _places(value)


def _changed(state: dict[str, Any], changes: bytes) -> dict[str, Any]:
    """`state` with one place after another made odd, or left out."""
    for where, what in zip(changes[0:40:2], changes[1:40:2], strict=False):
        places = list(_places(state))
        if places:
            table, key = places[where % len(places)]
            del table[key]
            if what % (len(ODD) + 1) < len(ODD):
                table[key] = ODD[what % (len(ODD) + 1)]()
    return state
