"""The faults that come from within a rank, and its log of samples: put in place without hooks in the product.

ESAM_CHAOS names a folder. `order` there is what the supervisor asks for, one fault at a time; `fired_N` says that the
fault N came about. `taken_RANK` tells where each process of the rank began, and which batches it took to train on;
`drawn_RANK` which samples were read for them, by whatever process.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("ESAM_CHAOS", "."))
RANK = int(os.environ.get("RANK", "0"))
PROGRAM = "esam_dist.cli"
READ = "__getitems__"
"""By this method torch's DataLoader reads a batch."""
STATE_BYTES = 600_000
"""About as large is a checkpoint of the campaign's network."""

real_time, real_fsync, real_open, real_rename = time.time, os.fsync, Path.open, Path.rename
me = f"{os.getpid()}.{time.monotonic_ns()}"
"""This process of the rank; what it forks tells of itself by the same name."""


class Orders:
    """What the supervisor asks for, read again when the file has changed."""

    def __init__(self) -> None:
        self._seen = 0
        self._order: dict[str, Any] = {}

    def current(self) -> dict[str, Any]:
        """The latest order, empty where there is none."""
        try:
            changed = os.stat(FOLDER / "order").st_mtime_ns
        except OSError:
            return {}
        if changed != self._seen:
            self._order, self._seen = json.loads(read_text(FOLDER / "order")), changed
        return self._order

    def due(self, kind: str) -> dict[str, Any]:
        """The order if it is of this kind, for this rank, and did not come about yet; else empty."""
        order = self.current()
        mine = order.get("kind") == kind and order["rank"] == RANK
        return order if mine and not (FOLDER / f"fired_{order['number']}").exists() else {}


orders = Orders()


def read_text(path: Path) -> str:
    """The text of a file, past the `open` that is replaced."""
    with real_open(path) as file:
        return str(file.read())


def die(order: dict[str, Any]) -> None:
    """Note that the fault came about, and be killed."""
    note(order)
    os.kill(os.getpid(), signal.SIGKILL)


def note(order: dict[str, Any]) -> None:
    """Note that the fault came about."""
    (FOLDER / f"fired_{order['number']}").touch()


def record(name: str, *words: object) -> None:
    """Add a line to one of the rank's logs, by one write, which a kill cannot divide."""
    file = os.open(FOLDER / f"{name}_{RANK}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (" ".join(map(str, [me, *words])) + "\n").encode())
    os.close(file)


class Dying(io.BufferedWriter):
    """A file whose writer is killed when part of a checkpoint is written."""

    def __init__(self, path: Path, order: dict[str, Any]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.order, self.left = order, order["amount"] * STATE_BYTES

    def write(self, data: Any) -> int:
        """Write, and be killed where enough is written."""
        written = super().write(data)
        self.left -= written
        if self.left < 0:
            self.close()
        return written

    def close(self) -> None:
        """Be killed with what is written."""
        super().flush()
        die(self.order)


def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
    """`Path.open`, whose writer may be killed in a checkpoint."""
    if mode == "wb" and ".partial_step_" in str(path) and path.name == "state.pt" and (order := orders.due("write")):
        return Dying(path, order)
    return real_open(path, mode, *args, **options)


def renamed(path: Path, target: Any) -> Path:
    """`Path.rename`, killed before or after it gives a checkpoint its name, or takes an old one's."""
    names = path.name, Path(target).name
    kind = ""
    if names[0].startswith(".partial_step_") and names[1].startswith("step_"):
        kind = "rename"
    elif names[0].startswith("step_") and names[1].startswith(".partial_step_"):
        kind = "prune"
    order = orders.due(kind) if kind else {}
    if order and order["amount"] < 0.5:
        die(order)
    moved = real_rename(path, target)
    if order:
        die(order)
    return moved


def flushed(file: int) -> None:
    """`os.fsync` of a disk that may be slow."""
    order = orders.due("slow")
    if order:
        note(order | {"number": f"{order['number']}_{time.monotonic_ns()}"})
        time.sleep(order["amount"])
    real_fsync(file)


def told_time() -> float:
    """`time.time` of a clock that may have been set back."""
    order = orders.current()
    return real_time() - (order["amount"] if order.get("kind") == "clock" and order["rank"] in (RANK, -1) else 0.0)


def install(_: ModuleType) -> None:
    """Replace what the faults and the log need, when the program is loaded and nothing has begun."""
    from esam_dist.data import Batch, TrainData, ValidationData
    from esam_dist.data.order import Picks
    from esam_dist.data.samples import Samples

    read, batches, validated = getattr(Samples, READ), TrainData.batches, ValidationData.batches

    def read_and_recorded(self: Samples, numbered: tuple[int, Picks]) -> Any:
        number, picks = numbered
        if self.train:  # validation counts its batches from 0 too
            record("drawn", number, *picks.ids.tolist())
        return read(self, numbered)

    def taken_and_recorded(self: TrainData, samples_seen: int) -> Iterator[Batch]:
        record("taken", "from", samples_seen)
        for number, batch in enumerate(batches(self, samples_seen)):
            record("taken", number)
            yield batch

    def validated_or_killed(self: ValidationData) -> Iterator[Batch]:
        for batch in validated(self):
            order = orders.due("validation")
            if order:
                die(order)
            yield batch

    setattr(Samples, READ, read_and_recorded)
    # To replace methods of others is what this file is for; mypy takes any such assignment for a mistake.
    TrainData.batches = taken_and_recorded  # type: ignore[method-assign]
    ValidationData.batches = validated_or_killed  # type: ignore[method-assign]
    Path.open, Path.rename = opened, renamed  # type: ignore[method-assign,assignment]
    os.fsync, time.time = flushed, told_time  # type: ignore[assignment]


class Awaited(MetaPathFinder):
    """Calls `install` as soon as the program's module is loaded."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """The program's module as the other finders have it, with `install` behind it."""
        if name != PROGRAM:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            install(module)

        loader.exec_module = execute_and_install  # type: ignore[method-assign]  # likewise: this one loader's own
        return spec


def await_program() -> None:
    """Put everything in place when the program is loaded."""
    sys.meta_path.insert(0, Awaited())
