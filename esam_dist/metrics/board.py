"""TensorBoard events, as an option; and the numbers of a row, as every tracker names them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esam_dist.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


log = logging.getLogger("esam_dist")


def scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row but its step: `kind/NAME`, and `phases/NAME`."""
    flat = {f"{kind}/{key}": value for key, value in values.items() if key != "step"}
    flat |= {f"phases/{phase}": seconds for phase, seconds in values.get("phases", {}).items()}
    return {key: value for key, value in flat.items() if isinstance(value, int | float) and math.isfinite(value)}


class TensorBoard:
    """Writes scalars to `folder/tensorboard`, until the disk refuses them: that ends no training.

    Raises UserError where the package is missing.
    """

    def __init__(self, folder: Path, failed: Callable[[], None] = lambda: None) -> None:
        if find_spec("tensorboard") is None:
            raise UserError(
                "metrics.tensorboard = true: the package is not installed; pip install 'esam-dist[tensorboard]'"
            )
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._refused = False
        self._failed = failed

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Write the numbers of one row under `kind/`, phases under `phases/`."""
        if self._refused:
            self._failed()
            return
        try:
            writer = self._open(values["step"])
            for key, value in scalars(kind, values).items():
                writer.add_scalar(key, value, values["step"])
        except OSError as error:
            self._refuse(error)

    def close(self) -> None:
        """Flush and close."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            log.error("%s: no more events can be written (%s)", self._folder, error.strerror)
        self._refused = True
        self._failed()

    def _open(self, step: int) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: TensorBoard hides what a killed process wrote after the step that the run resumed from
            self._writer = SummaryWriter(self._folder, purge_step=step)
        return self._writer
