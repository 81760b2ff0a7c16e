"""What ESAM needs of whoever averages gradients and updates weights: nine members hide DDP, DeepSpeed and one process.

An update spans `accumulate` micro-batches, which the engine counts: call `engine(images)`, `backward` and `step` once
for each; the gradient is averaged over ranks and the weights move with the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """One replica of the model in training."""

    module: nn.Module
    """The bare model: what is perturbed and evaluated. Calling it communicates nothing."""

    def __call__(self, images: Tensor | Callable[[], Tensor]) -> Tensor:
        """Logits [B, K] of `images` [B, 3, H, W], with a backward that is averaged over ranks.

        A function in place of images is called, and what it returns takes the place of the logits.
        """

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the factor that keeps float16 gradients from vanishing; in other types, `loss`.

        It is the factor of `backward`, the share of a micro-batch in its update included: a gradient taken without the
        engine overflows where one taken by it would, and not long before.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss` to the update under way."""

    def step(self, lr: float) -> Tensor:
        """End the micro-batch; after the last of an update: clip, update at rate `lr`, clear.

        Returns the norm of the averaged gradient before clipping, a scalar on the device; nan where no update ended.
        """

    def momentum(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Copies of the optimizer's momentum (AdamW: first moment) of `params`, whole; zero before the first update.

        Called by all ranks together; under ZeRO it costs one all-reduce of every parameter.
        """

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state on the CPU, whole, by parameter name: alike for every engine and world size.

        Called by all ranks together.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` of any engine returned. Called by all ranks together."""
