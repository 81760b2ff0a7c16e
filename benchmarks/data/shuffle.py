"""How well the windowed order shuffles, at ImageNet's size, against a perfect shuffle.

    python -m benchmarks.data.shuffle

Batches of 2,048 are drawn from 1,251 shards of 1,024 samples in 1,000 classes. `chi2` compares a batch's class counts
with equal shares, per degree of freedom: 1 is chance. Shards as `prepare` writes them are mixed; sorted ones are the
worst case.
"""

from __future__ import annotations

import time

import numpy as np

from esam_dist.data.order import Ids, mix, permutation

SHARDS, PER_SHARD, CLASSES, BATCH = 1251, 1024, 1000, 2048


def main() -> None:
    """Print a table."""
    num_samples = SHARDS * PER_SHARD
    by_class = np.arange(num_samples) * CLASSES // num_samples
    labels: dict[str, Ids] = {"prepared": by_class[np.argsort(mix(0, np.arange(num_samples)))], "sorted": by_class}
    print(f"{'shards':9} {'window':>7} {'classes/batch':>13} {'chi2':>8} {'same shard as before':>20} {'seconds':>8}")
    for window in (1, 16, 128, SHARDS):
        start = time.process_time()
        order = permutation(0, 0, [PER_SHARD] * SHARDS, window)
        seconds = time.process_time() - start
        for name, values in labels.items():
            _row(name, str(window), order, values, seconds)
    _row("any", "perfect", np.random.default_rng(0).permutation(num_samples), by_class, 0.0)


def _row(name: str, window: str, order: Ids, labels: Ids, seconds: float) -> None:
    batches = labels[order[: len(order) // BATCH * BATCH]].reshape(-1, BATCH)[::10]
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in batches])
    chi2 = ((counts - BATCH / CLASSES) ** 2 / (BATCH / CLASSES)).sum(1).mean() / (CLASSES - 1)
    shard = order // PER_SHARD
    neighbours = (shard[1:] == shard[:-1]).mean()
    print(f"{name:9} {window:>7} {(counts > 0).sum(1).mean():13.0f} {chi2:8.3f} {neighbours:20.4f} {seconds:8.2f}")


if __name__ == "__main__":
    main()
