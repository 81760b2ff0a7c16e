"""Sampling by class: every class comes equally often, as a pure function of seed and epoch.

Each class has an endless sequence of draws: one permutation of its samples after another. By epoch e, class c of K has
made floor((e N + c) / K) draws: these add up to e N, whatever e is, and no two classes differ by more than one. So an
epoch still has N draws. Nor do two samples of a class: the draws of one never lead those of another by more than one.

Letters: N samples in the set, K classes that have samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from esam_dist.data.order import Drawn, Ids, Order, mix, shuffled, windows

_ROUND = 4


@dataclass
class Balanced(Order):
    """The endless sequence in which every class of `labels` [N] comes equally often."""

    labels: Ids = field(default_factory=lambda: np.zeros(0, np.int64))

    def draw(self, epoch: int) -> Drawn:
        """The samples of one epoch, in order: those of a small class several times, of a large one some."""
        drawn = draw(self.seed, epoch, self.labels)
        places = shuffled(self.seed, epoch, drawn.ids, windows(self.seed, epoch, self.counts, self.window))
        return Drawn(drawn.ids[places], drawn.turns[places])


def draw(seed: int, epoch: int, labels: Ids) -> Drawn:
    """What the classes draw in one epoch, class by class; `labels` [N] holds the class of each sample."""
    members = np.argsort(labels, kind="stable")
    sizes_K = np.unique(labels, return_counts=True)[1]
    offsets_K = np.cumsum(sizes_K) - sizes_K
    begin_K, end_K = _draws(epoch, sizes_K), _draws(epoch + 1, sizes_K)
    # All rounds that the epoch touches, whole: a row for each round and each member of its class.
    first_K = begin_K // sizes_K
    rows_K = (np.maximum(end_K - 1, begin_K) // sizes_K - first_K + 1) * sizes_K
    label = np.repeat(np.arange(len(sizes_K)), rows_K)
    row = np.arange(len(label)) - np.repeat(np.cumsum(rows_K) - rows_K, rows_K)
    round_ = first_K[label] + row // sizes_K[label]
    ids = members[offsets_K[label] + row % sizes_K[label]]
    order = np.lexsort((mix(seed, _ROUND, round_, ids), round_, label))
    # Sorted, a class's rows are its draws in order, from the beginning of its first round on.
    number = first_K[label] * sizes_K[label] + row
    taken = (begin_K[label] <= number) & (number < end_K[label])
    return Drawn(ids[order][taken], (round_ - first_K[label])[taken])


def _draws(epoch: int, sizes_K: Ids) -> Ids:
    """How many draws each class has made when `epoch` begins."""
    num_classes = len(sizes_K)
    return (epoch * int(sizes_K.sum()) + np.arange(num_classes)) // num_classes
