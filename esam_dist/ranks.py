"""Which process of the job this is, and all our own collectives.

The all-reduce of a backward pass belongs to DDP or DeepSpeed. What is exchanged here is small (scores, statistics,
BatchNorm buffers), but for gradients that a method has made itself, and the averages that some methods keep.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esam_dist.errors import UserError, printable

T = TypeVar("T")
CPU = torch.device("cpu")
MANY = 10**9 - 1
PAUSE_SECONDS = 0.02
REMEDY = "start ranks by torchrun, deepspeed or `esam-dist launch`; for one process alone unset RANK and all its like"


@dataclass
class Pending:
    """A collective under way."""

    _result: Tensor
    _work: dist.Work | None

    def wait(self) -> Tensor:
        """Its result. On a GPU the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


@dataclass
class PendingMean:
    """An average under way."""

    _sum: Pending
    _shapes: list[torch.Size]
    _world_size: int

    def wait(self) -> list[Tensor]:
        """The mean over ranks of each tensor."""
        flat = self._sum.wait()
        if self._world_size > 1:
            flat.div_(self._world_size)
        parts = torch.split(flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank `rank` of `world_size`, number `local_rank` on its node, computing on `device`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @staticmethod
    def from_environment() -> Ranks:
        """Read RANK, LOCAL_RANK and WORLD_SIZE, set by torchrun or deepspeed; without them this is the only process.

        Raises UserError for what no launcher sets.
        """
        world_size, rank, local_rank = 1, 0, 0
        if any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            world_size = _number("WORLD_SIZE", 1, MANY)
            rank = _number("RANK", 0, world_size - 1)
            # A launcher of one rank per node may leave it out.
            local_rank = _number("LOCAL_RANK", 0, world_size - 1) if "LOCAL_RANK" in os.environ else 0
        if world_size > 1:
            _check_meeting_point()
        if not torch.cuda.is_available():
            return Ranks(rank, local_rank, world_size, CPU)
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local_rank}: this node has {torch.cuda.device_count()} GPUs; start no more ranks on it"
            )
        return Ranks(rank, local_rank, world_size, torch.device("cuda", local_rank))

    @staticmethod
    def of_process_group(device: torch.device) -> Ranks:
        """This process in the group that is already there, if any, computing on `device`."""
        if not dist.is_initialized():
            return Ranks(device=device)
        return Ranks(dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def gather_later(self, tensor: Tensor) -> Pending:
        """Begin to collect every rank's `tensor`: `wait` returns [W, *tensor.shape], in the order of ranks."""
        if self.world_size == 1:
            return Pending(tensor.unsqueeze(0), None)
        # Flat, because gloo takes only the concatenated form; nccl takes either. The old name warns in recent versions.
        gathered = tensor.new_empty(self.world_size * tensor.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(gathered, tensor.contiguous().view(-1), async_op=True)
        return Pending(gathered.view(self.world_size, *tensor.shape), work)

    def sum_later(self, tensor: Tensor) -> Pending:
        """Begin to sum `tensor` over ranks, in place: `wait` returns it."""
        work = dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None
        return Pending(tensor, work)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over ranks of each tensor, in one all-reduce."""
        return tensors if self.world_size == 1 else self.average_later(tensors).wait()

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, in all-reduces of some 25 MB, as DDP divides them."""
        if self.world_size == 1:
            return
        buckets: list[list[Tensor]] = [[]]
        for tensor in tensors:
            if sum(other.nbytes for other in buckets[-1]) > 25 * 2**20:
                buckets.append([])
            buckets[-1].append(tensor)
        for bucket, pending in [(bucket, self.average_later(bucket)) for bucket in buckets if bucket]:
            torch._foreach_copy_(bucket, pending.wait())

    def average_later(self, tensors: list[Tensor]) -> PendingMean:
        """Begin to average each tensor over ranks, in one all-reduce: `wait` returns the means, as new tensors."""
        flat = torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.zeros(0)
        shapes = [tensor.shape for tensor in tensors]
        return PendingMean(self.sum_later(flat) if tensors else Pending(flat, None), shapes, self.world_size)

    def share(self, value: T | None) -> T:
        """Rank 0's `value` (plain values and CPU tensors) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return cast(T, box[0])

    def collect(self, value: T) -> list[T]:
        """Every rank's `value` (plain values), in the order of ranks, on every rank; for what is rare."""
        box: list[T | None] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(box, value)
        return cast(list[T], box)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()

    def average_buffers(self, module: nn.Module) -> None:
        """Replace every floating-point buffer (BatchNorm statistics) by its mean over ranks, in one all-reduce.

        Each rank's running statistics come from its own batches. Averaging them after every update keeps replicas
        identical to the bit, so that validation and checkpoints do not depend on which rank is asked.
        """
        buffers = averaged_buffers(module)
        if self.world_size > 1 and buffers:
            torch._foreach_copy_(buffers, self.average(buffers))

    def take_from_first(self, module: nn.Module) -> None:
        """Replace parameters and buffers by those of rank 0."""
        if self.world_size > 1:
            for value in module.state_dict().values():
                # In memory of its own order: gloo takes no other.
                sent = value.contiguous()
                dist.broadcast(sent, src=0)
                value.copy_(sent)


def averaged_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that `Ranks.average_buffers` makes alike: the floating-point ones that a training pass may change.

    Not those of a BatchNorm in evaluation mode: a mean of equal numbers may differ from them by a rounding error.
    """
    still = {
        buffer
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not child.training
        for buffer in child.buffers(recurse=False)
    }
    return [buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer not in still]


def _number(name: str, least: int, most: int) -> int:
    """The environment variable `name` of a launcher's, from `least` to `most`. Raises UserError."""
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"{name} is not set, but others are that a launcher sets; {REMEDY}")
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        limits = f"from {least} to {most}" if most < MANY else f"of {least} or more"
        raise UserError(f"{name} = {printable(text[:40])!r}: must be a whole number {limits}; {REMEDY}")
    return int(text)


def _check_meeting_point() -> None:
    """Raise UserError where the ranks are not told how to meet."""
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise UserError(f"MASTER_ADDR is empty or not set: it is the host of rank 0; {REMEDY}")
    # In a pod of Kubernetes it may be the address of a Service of the name `master`: enableServiceLinks is for that.
    _number("MASTER_PORT", 1, 65535)


def limit_group(group: dist.ProcessGroup, timeout_seconds: float) -> None:
    """Let collectives of `group`, which another library made, fail after `timeout_seconds`."""
    # Recent versions have the public name, and warn about the other one.
    name = "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout"
    getattr(dist.distributed_c10d, name)(timedelta(seconds=timeout_seconds), group)


@functools.cache
def pause_before_forks() -> None:
    """Let every fork of this process, as that of a loader's worker, wait a moment while there is a process group.

    A thread of gloo lets go of a tensor a moment after its collective has ended, for which it may join the interpreter.
    If it is just then that the process forks, the child inherits a lock that nobody releases: CPython 3.11 takes it
    before it is made anew, and waits for ever. In the pause the thread is done.
    """

    def pause() -> None:
        if dist.is_initialized():
            time.sleep(PAUSE_SECONDS)

    os.register_at_fork(before=pause)


@contextmanager
def joined(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the job that the environment describes, for the length of the block, and leave it in order.

    A rank that waits longer than `timeout_seconds` for the others, here or in any collective of the block, fails.
    On an error the process group is not torn down. Its peers may be waiting in a collective, and the launcher ends
    them sooner than an orderly end would.
    """
    ranks = Ranks.from_environment()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.world_size > 1:
        pause_before_forks()
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    yield ranks
    if dist.is_initialized():
        ranks.barrier()
        dist.destroy_process_group()
