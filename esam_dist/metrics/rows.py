"""What the loop reports, as plain values that are already on the host."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainRow:
    """One log interval. Unless a field says otherwise, it is the mean over the interval and over all ranks."""

    step: int
    """Updates finished, counted from the beginning of the run."""
    epoch: float
    loss: float
    """Over what was finite; nan where nothing was, as for `grad_norm` and `sharpness`."""
    lr: float
    grad_norm: float
    sharpness: float | None
    """Rise of the loss at the perturbed weights; None where the method does not measure it."""
    kept_fraction: float
    images_per_second: float
    """All ranks together."""
    step_seconds: float
    data_wait_seconds: float
    """Per step: time in which a rank had no batch."""
    rho: float
    beta: float
    gamma: float
    selection_threshold: float | None
    """Lowest score among the samples kept; None where nothing is selected."""
    samples: int
    """Seen by all ranks since the beginning of the run, restarts included."""
    kept_samples: int
    """Kept for the descent by all ranks in this interval."""
    skipped_perturbations: int = 0
    """In this interval, because the ascent gradient was not finite."""
    skipped_updates: int = 0
    """In this interval, because the averaged gradient was not finite; weights and momentum stayed as they were."""
    sharp_updates: int = 0
    """Sharpness-aware updates in this interval; the others were plain."""
    skipped_samples: dict[str, int] = field(default_factory=dict)
    """By reason: samples that this rank could not read in this interval."""
    phases: dict[str, list[float]] = field(default_factory=dict)
    """By phase: this rank's seconds, one per step of this interval (`checkpoint` and `validate` are added by
    `Metrics.checkpoint_begun` and `Metrics.validation`)."""


@dataclass(frozen=True)
class ValidationRow:
    """One pass over the validation set, counted over all ranks. Accuracies lie in [0, 1]."""

    step: int
    epoch: float
    accuracy: float
    top5_accuracy: float
    loss: float
    seconds: float
    averaged_accuracy: float | None = None
    """Of the averaged weights (`train.average`); None without."""
    averaged_loss: float | None = None
    skipped_samples: dict[str, int] = field(default_factory=dict)
    """By reason: samples that this rank could not read in this pass."""
