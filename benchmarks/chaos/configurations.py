"""What is trained in the campaign: engines, ranks and methods, each as small as can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esam_dist.data.prepare.digits import Digits
from esam_dist.data.prepare.write import Plan, write_dataset

BATCH = 8
TRAIN, VALIDATION = 240, 24
"""Digits that are trained on, and validated."""
SAVE_EVERY = 4
COLLECTIVE_SECONDS = 25
"""Ranks wait so long for each other: shorter than on a cluster, longer than a start differs between two ranks here."""
TEXT = """\
run: {{folder: {folder}}}
model: {{name: cifar_resnet8}}
data: {{path: {data}, batch_size: {batch}, workers: 1, image_size: 8}}
train: {{epochs: {epochs}, max_steps: {steps}, log_every: 2, validate_every: 1}}
optim: {{lr: 0.05, schedule: constant, warmup_epochs: 0}}
method: {{name: {method}}}
engine: {{name: {engine}, zero_stage: {stage}, collective_timeout_seconds: {timeout}}}
checkpoint: {{every_steps: {every}, keep: 2}}
metrics: {{progress: lines}}
"""


@dataclass(frozen=True)
class Configuration:
    """One engine (`native`, `zero0`, `zero1`, `zero2`), so many ranks, one method, and the hosts they lie on."""

    engine: str
    ranks: int
    method: str
    hosts: int = 1

    @staticmethod
    def named(name: str) -> Configuration:
        """The configuration of that name, on one host."""
        engine, ranks, method = name.split("-")
        return Configuration(engine, int(ranks), method)

    @property
    def name(self) -> str:
        """What tells it from others, but for hosts, on which no number depends."""
        return f"{self.engine}-{self.ranks}-{self.method}"

    @property
    def samples_per_step(self) -> int:
        """Of all ranks together."""
        return self.ranks * BATCH

    def text(self, data: Path, folder: Path, steps: int) -> str:
        """The configuration file."""
        stage = int(self.engine[4:]) if self.engine.startswith("zero") else 1
        return TEXT.format(
            folder=folder,
            data=data,
            batch=BATCH,
            epochs=steps * self.samples_per_step // TRAIN + 2,
            steps=steps,
            method=self.method,
            engine="deepspeed" if self.engine.startswith("zero") else "native",
            stage=stage,
            timeout=COLLECTIVE_SECONDS,
            every=SAVE_EVERY,
        )


ALL = [
    *(Configuration("native", ranks, method) for ranks, method in ((2, "esam"), (3, "recycled"))),
    *(Configuration("zero0", ranks, method) for ranks, method in ((2, "sam"), (3, "sgd"))),
    *(Configuration("zero1", ranks, method) for ranks, method in ((2, "recycled"), (3, "sam"))),
    *(Configuration("zero2", ranks, method) for ranks, method in ((2, "sgd"), (3, "esam"))),
    Configuration("native", 2, "esam", hosts=2),
    Configuration("zero1", 2, "recycled", hosts=2),
]


class FewDigits(Digits):
    """Some of scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.labels = {"train": self.labels["train"][:TRAIN], "validation": self.labels["validation"][:VALIDATION]}


def prepare(folder: Path) -> None:
    """Write the data of the campaign, unless it is there."""
    if not (folder / "dataset.json").exists():
        write_dataset(FewDigits(), folder, Plan(samples_per_shard=60))
