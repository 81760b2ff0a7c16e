"""Two ranks that meet on this machine and add up a vector, as every run of several ranks does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing

from esam_dist.doctor.row import Row, fail, ok

SECONDS = 90.0
TIMES, LENGTH = 20, 2**18
REMEDIES = {
    "gloo": "see that this host's name resolves (getent hosts $HOSTNAME), or set GLOO_SOCKET_IFNAME=lo (several nodes: "
    "their interface)",
    "nccl": "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 tell where it fails; more /dev/shm",
}
# Nothing of ours is imported there: torch alone takes seconds.
PROGRAM = """
import datetime, os, sys, time
import torch
import torch.distributed as dist

backend, seconds, times, length = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rank = int(os.environ["RANK"])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
vector = torch.full((length,), rank + 1.0, device=device)
dist.all_reduce(vector)
world = dist.get_world_size()
assert bool((vector == world * (world + 1) / 2).all()), f"the sum is {vector[0].item()}"
start = time.perf_counter()
for _ in range(times):
    dist.all_reduce(vector)
vector[0].item()
print((time.perf_counter() - start) / times * 1000)
sys.stdout.flush()
dist.destroy_process_group()
"""


def all_reduce(backend: str, world_size: int, seconds: float = SECONDS) -> list[Row]:
    """Start `world_size` processes that meet by `backend`; they are ended after `seconds`."""
    name = f"all-reduce, {backend}"
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    words = [sys.executable, "-c", PROGRAM, backend, str(seconds), str(TIMES), str(LENGTH)]
    started = [
        subprocess.Popen(
            words,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    end = time.monotonic() + seconds
    try:
        told = [process.communicate(timeout=max(0.1, end - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        return [fail(name, f"{world_size} ranks did not meet within {seconds:g} s", REMEDIES[backend])]
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
    for process, (_, errors) in zip(started, told, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            return [fail(name, last[:160], REMEDIES[backend])]
    milliseconds = float(told[0][0].split()[-1])
    return [ok(name, f"{world_size} rank(s), {4 * LENGTH / 2**20:.0f} MiB in {milliseconds:.1f} ms")]


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
