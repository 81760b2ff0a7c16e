"""Record the scores of real training, for the simulation to draw from.

    python -m benchmarks.coordination.record

trains cifar_resnet8 with SAM on scikit-learn's digits (8 epochs, 16 pixels, batch 32, rho 0.05, one random shift a
batch) and after epochs 1, 3 and 8 plays all ranks of a job in turn: each perturbs the weights with the gradient of its
own batch of 32 and records the rise of each of its samples' losses. Once with batches drawn at random, once with every
rank holding two classes only, a shard of its own. Writes results/scores.csv: epoch, shards, rank, rise. A few minutes
on one core.
"""

from __future__ import annotations

import csv

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coordination.draws import RESULTS
from esam_dist.models.cifar_resnet import cifar_resnet8

BATCH, RHO, EPOCHS, RECORDED = 32, 0.05, 8, (1, 3, 8)


def main() -> None:
    """Train, and record on the way."""
    torch.manual_seed(0)
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0, size=16)
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(data.target)
    model = cifar_resnet8(10)
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1, pct_start=1 / EPOCHS)
    rows: list[tuple[int, str, int, str]] = []
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(labels)).split(BATCH):
            if len(batch) == BATCH:
                shifts = tuple(torch.randint(-1, 2, (2,)).tolist())
                _train(model, optimizer, images[batch].roll(shifts, (2, 3)), labels[batch])
                schedule.step()
        if epoch in RECORDED:
            rows += [(epoch, *row) for row in _record(model, images, labels)]
            print(f"epoch {epoch}: median rise {torch.tensor([float(row[3]) for row in rows]).median():.3g}")
    with (RESULTS / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("epoch", "shards", "rank", "rise"), *rows])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    eps = _perturb(model, F.cross_entropy(model(images), labels))
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    _move(model, eps, -1.0)
    optimizer.step()


def _record(model: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[str, int, str]]:
    """Every rank's rises, with the BatchNorm of its own batch as in training, whose statistics stay where they are."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    rows = []
    by_class = torch.cat([part[torch.randperm(len(part))] for part in labels.argsort(stable=True).split(360)])
    for shards, order in (("shuffled", torch.randperm(len(labels))), ("two classes", by_class)):
        for rank, batch in enumerate(order.split(BATCH)):
            if len(batch) == BATCH:
                loss_B = F.cross_entropy(model(images[batch]), labels[batch], reduction="none")
                eps = _perturb(model, loss_B.mean())
                with torch.no_grad():
                    rise_B = F.cross_entropy(model(images[batch]), labels[batch], reduction="none") - loss_B
                _move(model, eps, -1.0)
                rows += [(shards, rank, f"{rise:.5g}") for rise in rise_B.tolist()]
    model.load_state_dict(saved)
    return rows


def _perturb(model: nn.Module, loss: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    eps = [grad * (RHO / norm) for grad in grads]
    _move(model, eps, 1.0)
    return eps


@torch.no_grad()
def _move(model: nn.Module, eps: list[Tensor], sign: float) -> None:
    for param, direction in zip(model.parameters(), eps, strict=True):
        param.add_(direction, alpha=sign)


if __name__ == "__main__":
    main()
