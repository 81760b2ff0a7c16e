"""TensorBoard events, as an option."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esam_dist.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes scalars to `folder/tensorboard`. Raises UserError where the package is missing."""

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise UserError(
                "metrics.tensorboard = true: the package is not installed; pip install 'esam-dist[tensorboard]'"
            )
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Write the numbers of one row under `kind/`, phases under `phases/`."""
        writer = self._open(values["step"])
        for key, value in values.items():
            if key == "phases":
                for phase, seconds in value.items():
                    writer.add_scalar(f"phases/{phase}", seconds, values["step"])
            elif isinstance(value, int | float) and key != "step" and math.isfinite(value):
                writer.add_scalar(f"{kind}/{key}", value, values["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: TensorBoard hides what a killed process wrote after the step that the run resumed from
            self._writer = SummaryWriter(self._folder, purge_step=step)
        return self._writer
