"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where a run stands; `saved` is, with the engine's and the method's state, all that a checkpoint holds.

    There is no random state in it: data order, augmentation, perturbed weights and dropout are functions of `step` and
    `samples`.
    """

    planned_steps: int = 0
    """Updates of the whole run."""
    step: int = 0
    """Updates made."""
    samples: int = 0
    """Position in the global sequence of samples, over all ranks."""
    sharp_updates: int = 0
    """Of the updates made, the sharpness-aware ones."""
    skipped_in_a_row: int = 0
    """Of the updates made, the latest ones that were skipped, as their gradient was not finite."""
    validation_is_missing: bool = False
    """Whether the validation after the last update is still to be made, as a stop came before it or into it."""
    restarts: int = 0
    """Starts after the first, that of this process included."""
    not_finite: int = 0
    """Earlier processes that ended because the loss was not finite."""

    def saved(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "samples_seen": self.samples,
            "sharp_updates": self.sharp_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "validation_is_missing": self.validation_is_missing,
        }

    @staticmethod
    def of(saved: dict[str, Any] | None) -> Progress:
        """From `saved`; the beginning for None. Checkpoints of earlier versions hold more, or less."""
        if saved is None:
            return Progress()
        return Progress(
            step=saved["step"],
            samples=saved["samples_seen"],
            sharp_updates=saved.get("sharp_updates", 0),
            skipped_in_a_row=saved.get("skipped_in_a_row", 0),
            validation_is_missing=bool(saved.get("validation_is_missing", False)),
        )
