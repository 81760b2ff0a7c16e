"""BatchNorm's running statistics: they move once per update, at the unperturbed weights, whatever passes it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esam_dist.ranks import averaged_buffers


@contextmanager
def frozen_batchnorm(module: nn.Module) -> Iterator[None]:
    """Forward passes inside the block leave BatchNorm's running statistics alone, and still normalise by the batch.

    A momentum of 0 would not do: for a batch that is not finite it multiplies 0 by nan.
    """
    norms = [
        child
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training and child.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class SoundBuffers:
    """Statistics that a batch has made infinite or nan go back to what they were: else they stay so for ever."""

    def __init__(self, module: nn.Module) -> None:
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        # In one piece, for a launch per buffer would be felt; of a network over several devices there is none.
        self._buffers = buffers if len({buffer.device for buffer in buffers}) == 1 else []
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._sound = self._joined()

    def restore(self) -> None:
        """At the end of an update, when all ranks have the same statistics."""
        if not self._buffers:
            return
        now = self._joined()
        self._sound = torch.where(torch.isfinite(now), now, self._sound)
        parts = torch.split(self._sound, self._sizes)
        torch._foreach_copy_(self._buffers, [part.view_as(own) for part, own in zip(parts, self._buffers, strict=True)])

    def _joined(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else torch.zeros(0)


class GroupStatistics:
    """Running statistics of groups that share an update, as if each group were on a rank of its own.

    Every group starts from the same statistics, and the results are averaged. So they do not depend on how the groups
    are spread over ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        counts = [buffer for buffer in module.buffers() if not buffer.is_floating_point()]
        self._buffers = [*averaged_buffers(module), *counts]
        self._start = [buffer.clone() for buffer in self._buffers]
        self._ends: list[list[Tensor]] = []

    def end_group(self) -> None:
        """Note the statistics after one group, and return to the start for the next."""
        self._ends.append([buffer.clone() for buffer in self._buffers])
        for buffer, start in zip(self._buffers, self._start, strict=True):
            buffer.copy_(start)

    def finish(self) -> None:
        """Set the statistics to the mean over the groups, and a count of batches to that of a single group."""
        for buffer, *ends in zip(self._buffers, *self._ends, strict=True):
            buffer.copy_(torch.stack(ends).mean(0) if buffer.is_floating_point() else ends[0])
