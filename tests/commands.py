"""The command line in three ways: in this process, on ranks of their own, and under the real launchers."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from esam_dist.cli import main

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 600

# A process that has imported torch and DeepSpeed once is forked for every rank: seconds saved, nothing shared.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["esam_dist.cli", "deepspeed"])


class Answer(NamedTuple):
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


def here(*args: object) -> Answer:
    """Run `esam-dist ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    return Answer(ended.value.code or 0, out.getvalue(), err.getvalue())


def on_ranks(
    *args: object,
    count: int = 2,
    meanwhile: Callable[[list[int]], None] | None = None,
    first: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Run `esam-dist ARGS` on `count` ranks: real processes that meet over gloo, as a launcher would start them.

    `meanwhile` is called with their process ids; `first`, a function of a module, in each of them with its rank.
    """
    port = free_port()
    with TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(count)]
        ranks = [
            SERVER.Process(target=_rank, args=(rank, count, port, [str(arg) for arg in args], *outputs[rank], first))
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        if meanwhile:
            meanwhile([process.pid for process in ranks])
        for process in ranks:
            process.join(TIMEOUT_SECONDS)
        for process in ranks:
            process.kill()
            process.join()
        return [
            Answer(process.exitcode, out.read_text(), err.read_text())
            for process, (out, err) in zip(ranks, outputs, strict=True)
        ]


def alone(*args: object, **env: str) -> Answer:
    """Run `python -m esam_dist ARGS` in a process of its own."""
    return _started([sys.executable, "-m", "esam_dist", *map(str, args)], env)


def under_torchrun(*args: object, **env: str) -> Answer:
    """Run the command on two ranks, started by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return _started([*launcher, "-m", "esam_dist", *map(str, args)], env)


def under_deepspeed(*args: object, **env: str) -> Answer:
    """Run the command on two ranks, started by deepspeed."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    return _started([*launcher, "--module", "esam_dist", *map(str, args)], env)


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind in the metrics of the run in `folder`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def free_port() -> int:
    """A port that nobody listens on, and whose successor is free too.

    Below the range from which outgoing connections take theirs: a client that asks there before anybody listens can
    be given the very port that it calls, and then talks to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with closing(socket()) as first, closing(socket()) as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def environment(**env: str) -> dict[str, str]:
    """The environment of a process that runs this source tree; its own programs (ninja) are found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | env


def wait_for(condition: Callable[[], object]) -> None:
    """Return as soon as `condition` holds."""
    until = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def _started(command: list[str], env: dict[str, str]) -> Answer:
    ended = subprocess.run(
        command, env=environment(**env), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    return Answer(ended.returncode, ended.stdout, ended.stderr)


def _rank(
    rank: int, count: int, port: int, args: list[str], out: Path, err: Path, first: Callable[[int], None] | None
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if first is not None:
        first(rank)
    main(args)
