"""Are the replicas alike? A hash of the weights, compared over ranks: gradients that are averaged never show that a bit
flipped in the memory of one rank, and from then on it trains another network than the others.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from esam_dist.errors import ReplicasDifferError
from esam_dist.ranks import Pending, Ranks

logger = logging.getLogger(__name__)

PART = 1 << 20
"""Elements that are hashed at a time: of them there are copies in 64 bits."""
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """64 bits on `device` from all bits of `tensors` and their places; no other arithmetic than that of integers.

    Each word is multiplied by an odd number of its own, modulo 2^64, and all are summed up. So one flipped bit always
    changes the sum, whichever it is, as no power of two below 2^32 times odd numbers is a multiple of 2^64. The host
    waits for nothing.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    weights: Tensor | None = None
    for part in _parts(tensors):
        if weights is None:
            # The first part is the longest.
            weights = torch.arange(len(part), device=device).mul_(_ODD[0]).bitwise_or_(1)
        total = total * _ODD[1] + (part * weights[: len(part)]).sum()
    return total


def _parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The words of all tensors in order, as integers: [up to PART]. Small tensors share one, for the sake of a GPU."""
    waiting: list[Tensor] = []
    count = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        while len(flat):
            taken, flat = flat[: PART - count], flat[PART - count :]
            waiting.append(taken)
            count += len(taken)
            if count == PART:
                yield torch.cat([words.long() for words in waiting])
                waiting, count = [], 0
    if waiting:
        yield torch.cat([words.long() for words in waiting])


class Replicas:
    """Compares what all ranks must hold alike; with one rank there is nothing to compare."""

    def __init__(self, ranks: Ranks, every_steps: int) -> None:
        self._ranks = ranks
        self._every = every_steps if ranks.world_size > 1 else 0
        self._checked = 0
        self._pending: Pending | None = None

    def begin(self, tensors: Sequence[Tensor], step: int, *, saves: bool = False) -> None:
        """Begin to compare, where it is time at `step`, or a checkpoint is to be written."""
        if self._every and (saves or step - self._checked >= self._every):
            self._checked = step
            self._pending = self._ranks.gather_later(fingerprint(tensors, self._ranks.device).view(1))

    def end(self, step: int, remedy: Callable[[], str]) -> None:
        """Raise ReplicasDifferError, on all ranks alike, where what was begun shows a difference."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        prints_W = pending.wait().view(-1).tolist()
        fault = difference(prints_W)
        if fault is None:
            return
        if prints_W[self._ranks.rank] != Counter(prints_W).most_common(1)[0][0]:
            logger.error("this is rank %d, on %s: its weights differ", self._ranks.rank, socket.gethostname())
        raise ReplicasDifferError(
            f"{fault} at step {step}: a bit flipped in the memory of a rank, or its device computes wrongly; nothing "
            f"is saved; {remedy()}"
        )


def difference(prints_W: Sequence[int]) -> str | None:
    """Which of W ranks differ from the majority, in words; None: none does."""
    groups = Counter(prints_W)
    (most, count), *others = groups.most_common()
    if not others:
        return None
    if 2 * count > len(prints_W):
        odd = [rank for rank, value in enumerate(prints_W) if value != most]
        return f"the weights of {_ranks(odd)} differ from those of the other {count} ranks"
    parts = [_ranks([rank for rank, value in enumerate(prints_W) if value == which]) for which in groups]
    return f"the weights of {', '.join(parts[:-1])} and {parts[-1]} differ, and no majority tells which are right"


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
