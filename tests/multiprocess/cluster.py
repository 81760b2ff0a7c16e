"""Real ranks for tests: processes that joined one gloo group and run whatever function they are sent.

They live as long as the test session, so that torch is imported once per rank and not once per test.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp


class Cluster:
    """`world_size` ranks, which wait `timeout_seconds` for each other in a collective.

    `run(function, *args)` returns `function(ranks, *args)` of each, in order.
    """

    def __init__(self, world_size: int, timeout_seconds: float = 60.0) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, timeout_seconds), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join(10)


def _serve(pipe: Connection, rank: int, world_size: int, port: int, timeout_seconds: float) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    from esam_dist.ranks import joined

    with joined(timeout_seconds) as ranks:
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, function(ranks, *args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
