"""python -m benchmarks.replicas: the time of a comparison of the weights beside that of an update, in one run.

What one rank does for it: the hash of weights and statistics. Beside it go 8 bytes to every other rank. The update is
SAM's, in float32, on as many threads.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn import functional as F

from esam_dist import SharpnessAware, methods
from esam_dist.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results" / "cost.csv"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measured(name, args.batch, args.repeat, device) for name in args.models]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measured(name: str, batch: int, repeat: int, device: torch.device) -> dict[str, Any]:
    """Medians for one network."""
    network = torchvision.models.get_model(name, weights=None).to(device)
    tensors = [*network.parameters(), *(each for each in network.buffers() if each.is_floating_point())]
    trainer = SharpnessAware(network, torch.optim.SGD(network.parameters(), lr=0.01), methods.SAM(rho=0.05))
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)

    def update() -> None:
        trainer.step(images, labels, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))

    hashed = [timed(lambda: int(fingerprint(tensors, device)), device) for _ in range(repeat + 1)][1:]
    updated = [timed(update, device) for _ in range(min(repeat, 3))]
    row = {
        "model": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()}",
        "batch": batch,
        "elements": sum(tensor.numel() for tensor in tensors),
        "check_ms": round(1000 * statistics.median(hashed), 2),
        "check_ms_max": round(1000 * max(hashed), 2),
        "update_ms": round(1000 * statistics.median(updated), 1),
    }
    row["share_every_100"] = round(row["check_ms"] / row["update_ms"] / 100, 6)
    print(row, flush=True)
    return row


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
