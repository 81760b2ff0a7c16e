"""The Prometheus side: names, help texts, and the values of one rank.

A gauge that has no value yet is absent, not 0: an alert on a missing loss is honest, one on a loss of 0 is not.

Counters start at 0 in every process, as Prometheus expects, with every label value that they can have, because
Prometheus sees no rise in a series that only begins. Counters of the run's history count over all its processes. They
are absent on a rank that does not know the history yet, because a start at 0 would look like a rise by all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esam_dist.metrics.rows import TrainRow, ValidationRow
from esam_dist.progress import Progress

GAUGES = {
    "esam_step": "Updates finished since the beginning of the run.",
    "esam_planned_steps": "Updates of the whole run.",
    "esam_epoch": "Passes over the training data, with fraction.",
    "esam_train_loss": "Mean training loss at the unperturbed weights over the last log interval.",
    "esam_learning_rate": "Learning rate of the last update.",
    "esam_gradient_norm": "Global L2 norm of the last averaged gradient, before clipping.",
    "esam_sharpness": "Mean rise of the training loss at the perturbed weights.",
    "esam_kept_fraction": "Share of the samples kept for the descent (SDS), 0 to 1.",
    "esam_selection_threshold": "Lowest score among the samples kept (SDS).",
    "esam_rho": "Radius of the perturbation.",
    "esam_beta": "Share of the weights perturbed (SWP), 0 to 1.",
    "esam_gamma": "Share of the samples to keep (SDS), 0 to 1.",
    "esam_images_per_second": "Training images per second of all ranks together.",
    "esam_step_seconds": "Mean seconds per update over the last log interval.",
    "esam_data_wait_seconds": "Mean seconds per update, over all ranks, in which a rank had no batch.",
    "esam_world_size": "Ranks of the job.",
    "esam_validation_accuracy": "Top-1 accuracy of the last validation, 0 to 1.",
    "esam_validation_top5_accuracy": "Top-5 accuracy of the last validation, 0 to 1.",
    "esam_validation_loss": "Loss of the last validation.",
    "esam_validation_averaged_accuracy": "Top-1 accuracy of the averaged weights in the last validation, 0 to 1.",
    "esam_validation_best_accuracy": "Highest top-1 accuracy that this process has seen, 0 to 1.",
    "esam_validation_best_epoch": "Epoch of the highest top-1 accuracy.",
    "esam_checkpoint_last_step": "Update of the last checkpoint.",
    "esam_checkpoint_last_success_timestamp_seconds": "Unix time of the last checkpoint that was completed.",
    "esam_start_timestamp_seconds": "Unix time at which this process began to report.",
}
RANK_GAUGES = {
    "esam_last_step_timestamp_seconds": "Unix time at which this rank finished its last update.",
}
COUNTERS = {
    "esam_samples_total": "Training samples seen by all ranks.",
    "esam_kept_samples_total": "Training samples kept for the descent by all ranks (SDS).",
    "esam_sharp_updates_total": "Updates that were sharpness-aware, by the method's phase and interval.",
    "esam_skipped_perturbations_total": "Updates without perturbation, because the ascent gradient was not finite.",
    "esam_skipped_updates_total": "Updates that were skipped, because the averaged gradient was not finite.",
    "esam_checkpoint_failures_total": "Checkpoints that could not be written.",
    "esam_tracker_failures_total": "Rows that TensorBoard, Weights & Biases or MLflow did not take.",
}
HISTORY = {
    "esam_restarts_total": "Starts of this run after the first.",
    "esam_loss_not_finite_total": "Ends of this run because the loss, too many gradients, or a weight were not finite.",
}
OPTIONAL = {"esam_sharpness", "esam_selection_threshold"}
SKIPPED = ("esam_skipped_samples_total", "Samples that this rank could not read, by reason.")
PHASE = ("esam_phase_seconds", "Seconds of this rank in one phase of an update, a checkpoint or a validation.")
INFO = ("esam_run_info", "What runs: always 1, the facts are labels.")
REASONS = (
    *("unreadable", "empty", "checksum", "undecodable", "too_large", "label"),
    *("unreachable", "broken_shard"),  # when streaming
)
PHASES = ("data", "ascent", "score", "select", "descent", "update", "checkpoint", "validate")
BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


def names() -> dict[str, str]:
    """Every exposed metric name with its help text: what dashboards, rules and documentation are checked against."""
    return GAUGES | RANK_GAUGES | COUNTERS | HISTORY | dict([SKIPPED, PHASE, INFO])


class Exposition(Collector):
    """The values of one rank in `registry`."""

    def __init__(self, registry: CollectorRegistry, *, rank: int, world_size: int, run_info: dict[str, str]) -> None:
        self.registry = registry
        self._rank = str(rank)
        self._values: dict[str, float] = {"esam_world_size": world_size}
        self._samples = 0
        self._counters = {name: Counter(name, text, registry=registry) for name, text in COUNTERS.items()}
        self._skipped = Counter(*SKIPPED, ["rank", "reason"], registry=registry)
        self._phase = Histogram(*PHASE, ["rank", "phase"], buckets=BUCKETS, registry=registry)
        for phase in PHASES:
            self._phase.labels(self._rank, phase)
        for reason in REASONS:
            self._skipped.labels(self._rank, reason)
        Info(INFO[0].removesuffix("_info"), INFO[1], registry=registry).info(run_info | {"rank": self._rank})
        ProcessCollector(registry=registry)
        registry.register(self)

    def set(self, name: str, value: float | None) -> None:
        """Set the gauge `name`; None removes it, and so does nan where it means "not measured"."""
        if value is None or (name in OPTIONAL and math.isnan(value)):
            self._values.pop(name, None)
        else:
            self._values[name] = value

    def get(self, name: str) -> float | None:
        """The gauge's value, or None where it has none."""
        return self._values.get(name)

    def take_up(self, progress: Progress) -> None:
        """Show where the run stands; what earlier processes saw is left out of `esam_samples_total`."""
        self._samples = progress.samples
        self.set("esam_planned_steps", progress.planned_steps)
        self.set("esam_step", progress.step)
        self.set("esam_restarts_total", progress.restarts)
        self.set("esam_loss_not_finite_total", progress.not_finite)

    def train(self, row: TrainRow) -> None:
        """Add one log interval."""
        for name, value in _gauges(row).items():
            self.set(name, value)
        self._counters["esam_samples_total"].inc(max(0, row.samples - self._samples))
        self._samples = row.samples
        self._counters["esam_kept_samples_total"].inc(row.kept_samples)
        self._counters["esam_sharp_updates_total"].inc(row.sharp_updates)
        self._counters["esam_skipped_perturbations_total"].inc(row.skipped_perturbations)
        self._counters["esam_skipped_updates_total"].inc(row.skipped_updates)
        self._skip(row.skipped_samples)
        for phase, seconds in row.phases.items():
            for value in seconds:
                self.observe(phase, value)

    def validation(self, row: ValidationRow) -> None:
        """Add one validation."""
        self.set("esam_validation_accuracy", row.accuracy)
        self.set("esam_validation_top5_accuracy", row.top5_accuracy)
        self.set("esam_validation_loss", row.loss)
        self.set("esam_validation_averaged_accuracy", row.averaged_accuracy)
        if row.accuracy > (self.get("esam_validation_best_accuracy") or -math.inf):
            self.set("esam_validation_best_accuracy", row.accuracy)
            self.set("esam_validation_best_epoch", row.epoch)
        self._skip(row.skipped_samples)
        self.observe("validate", row.seconds)

    def not_finite(self) -> None:
        """Count the end of the run because the loss, or too many gradients in a row, were not finite."""
        self.set("esam_loss_not_finite_total", (self.get("esam_loss_not_finite_total") or 0) + 1)

    def checkpoint_failed(self) -> None:
        """Count a checkpoint that could not be written."""
        self._counters["esam_checkpoint_failures_total"].inc()

    def tracker_failed(self) -> None:
        """Count a row that a tracker did not take."""
        self._counters["esam_tracker_failures_total"].inc()

    def observe(self, phase: str, seconds: float) -> None:
        """Add one duration to the histogram of phases."""
        self._phase.labels(self._rank, phase).observe(seconds)

    def _skip(self, samples: dict[str, int]) -> None:
        for reason, count in samples.items():
            self._skipped.labels(self._rank, reason).inc(count)

    def collect(self) -> Iterable[Metric]:
        """Yield what has a value; called by the registry on every scrape."""
        for name, text in GAUGES.items():
            if (value := self.get(name)) is not None:
                yield GaugeMetricFamily(name, text, value=value)
        for name, text in RANK_GAUGES.items():
            if (value := self.get(name)) is not None:
                family = GaugeMetricFamily(name, text, labels=["rank"])
                family.add_metric([self._rank], value)
                yield family
        for name, text in HISTORY.items():
            if (value := self.get(name)) is not None:
                yield CounterMetricFamily(name, text, value=value)

    def describe(self) -> Iterable[Metric]:
        """Yield all of them without values, so that the registry refuses a second metric of the same name."""
        for name, text in (GAUGES | RANK_GAUGES).items():
            yield GaugeMetricFamily(name, text)
        for name, text in HISTORY.items():
            yield CounterMetricFamily(name, text)


def _gauges(row: TrainRow) -> dict[str, float | None]:
    return {
        "esam_epoch": row.epoch,
        "esam_train_loss": row.loss,
        "esam_learning_rate": row.lr,
        "esam_gradient_norm": row.grad_norm,
        "esam_sharpness": row.sharpness,
        "esam_kept_fraction": row.kept_fraction,
        "esam_selection_threshold": row.selection_threshold,
        "esam_rho": row.rho,
        "esam_beta": row.beta,
        "esam_gamma": row.gamma,
        "esam_images_per_second": row.images_per_second,
        "esam_step_seconds": row.step_seconds,
        "esam_data_wait_seconds": row.data_wait_seconds,
    }
