"""`esam-dist doctor [CONFIG]`: all checks in turn, one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from esam_dist import config
from esam_dist.doctor import machine, meeting, software
from esam_dist.doctor.row import Row, bounded
from esam_dist.report.command import in_columns

FAILED = 1
SECONDS = 20.0
"""For each check; those that start processes have more."""

Check = Callable[[], Sequence[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist doctor` on `parser`."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="look also at what this run needs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist doctor`: 0, or 1 where something fails. Raises UserError for a wrong configuration."""
    cfg = config.load(args.config, args.overrides) if args.config else config.Config()
    rows = [
        row for name, check, seconds in checks(cfg, whole=bool(args.config)) for row in bounded(name, check, seconds)
    ]
    print(table(rows))  # noqa: T201
    return FAILED if any(row.state == "fail" for row in rows) else 0


def checks(cfg: config.Config, *, whole: bool) -> Iterator[tuple[str, Check, float]]:
    """Every check: its name, what it does, and how long it may take; `whole`: with what only a configuration says."""
    yield "versions", partial(software.versions, cfg), SECONDS
    yield "devices", software.devices, 2 * SECONDS
    yield "NCCL", software.nccl, SECONDS
    yield "shared memory", partial(machine.shared_memory, cfg), SECONDS
    yield "disk", partial(machine.disk, cfg), SECONDS
    yield "ports", partial(machine.ports, cfg), SECONDS
    if whole:
        yield "data", partial(machine.data, cfg), SECONDS
    yield "decoding", machine.decoding, SECONDS
    yield "all-reduce, gloo", partial(meeting.all_reduce, "gloo", 2), meeting.SECONDS + SECONDS
    if gpus := torch.cuda.device_count():
        yield "all-reduce, nccl", partial(meeting.all_reduce, "nccl", min(2, gpus)), meeting.SECONDS + SECONDS


def table(rows: list[Row]) -> str:
    """One line for each row, and the sum of it."""
    counts = {state: sum(row.state == state for row in rows) for state in ("ok", "warn", "fail")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{in_columns([['check', '', 'found', 'remedy'], *map(list, rows)])}\n{told}"
