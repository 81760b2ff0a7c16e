"""Progress on rank 0: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, NoReturn

from esam_dist.metrics.rows import TrainRow, ValidationRow

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("esam_dist")


def wants_bar(progress: str) -> bool:
    """Whether `metrics.progress` and the terminal ask for a bar."""
    return progress == "bar" or (progress == "auto" and sys.stderr.isatty())


# Digits stay, the bar takes what is left; what does not fit tqdm would cut off on the right, where the news is.
BAR_FORMAT = "{n_fmt}/{total_fmt}[{bar}] {elapsed}<{remaining}  {postfix}"
LEAST_BAR, WIDTH = 4, 80


def fitting(row: TrainRow, columns: int) -> str:
    """The values that fit into `columns`, those that matter most before others, in their usual order."""
    words = _train_words(row)
    by_weight = sorted(words, key=lambda word: WEIGHT.get(word.split()[0] if word[0].isalpha() else "images", 9))
    kept: list[str] = []
    for word in by_weight:
        if len("  ".join([*kept, word])) <= columns:
            kept.append(word)
    return "  ".join(word for word in words if word in kept)


WEIGHT = {name: place for place, name in enumerate(("loss", "epoch", "images", "lr", "sharpness", "kept"))}


class LogLines:
    """One log line per row."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def progress(self, step: int) -> None:
        """Do nothing: the rows say enough."""

    def train(self, row: TrainRow) -> None:
        """Log one interval."""
        log.info("step %d/%d  %s", row.step, self._total, "  ".join(_train_words(row)))

    def validation(self, row: ValidationRow) -> None:
        """Log one validation."""
        log.info("step %d/%d  %s", row.step, self._total, _validation_words(row))

    def checkpoint(self, step: int, seconds: float) -> None:
        """Log one checkpoint."""
        log.info("step %d/%d  checkpoint saved in %.1f s", step, self._total, seconds)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class ProgressBar:
    """A tqdm bar followed by the newest values; validations stay on the screen."""

    def __init__(self, total_steps: int) -> None:
        from tqdm import tqdm

        self._bar: tqdm[NoReturn] = tqdm(
            total=total_steps, dynamic_ncols=True, file=sys.stderr, bar_format=BAR_FORMAT, ascii=" -"
        )
        self._fresh = True

    def progress(self, step: int) -> None:
        """Move the bar to `step`; after a resume the speed is measured from there."""
        if self._fresh:
            self._bar.initial = self._bar.n = self._bar.last_print_n = step - 1
            self._fresh = False
        self._bar.update(step - self._bar.n)

    def train(self, row: TrainRow) -> None:
        """Show one interval."""
        drawn = self._bar.format_dict
        # Digits of the steps, two times of at most 8 characters, and the signs between them.
        taken = 2 * len(str(drawn["total"])) + len("/[] 00:00:00<00:00:00  ") + LEAST_BAR
        self._bar.set_postfix_str(fitting(row, (drawn["ncols"] or WIDTH) - 1 - taken), refresh=False)

    def validation(self, row: ValidationRow) -> None:
        """Leave one line above the bar."""
        self._bar.write(f"step {row.step}  {_validation_words(row)}", file=sys.stderr)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Do nothing: the bar has no room for it."""

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _train_words(row: TrainRow) -> list[str]:
    words = [f"epoch {row.epoch:.2f}", f"loss {row.loss:.4f}", f"lr {row.lr:.3g}", f"kept {row.kept_fraction:.0%}"]
    if row.sharpness is not None and math.isfinite(row.sharpness):
        words.append(f"sharpness {row.sharpness:.4f}")
    return [*words, f"{row.images_per_second:.0f} img/s"]


def _validation_words(row: ValidationRow) -> str:
    averaged = "" if row.averaged_accuracy is None else f" (averaged {row.averaged_accuracy:.4f})"
    return (
        f"epoch {row.epoch:.2f}  validation accuracy {row.accuracy:.4f}{averaged}  top-5 {row.top5_accuracy:.4f}  "
        f"loss {row.loss:.4f}  in {row.seconds:.1f} s"
    )
