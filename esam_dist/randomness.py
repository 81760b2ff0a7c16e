"""Random numbers as functions of integers such as seed and step, and drawn twice where two passes must agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seed_step(*names: int) -> torch.Generator:
    """Seed torch's own generators (dropout) for one step, and return another generator for our own draws."""
    own, ours = np.random.SeedSequence(names).generate_state(2, np.uint64)
    torch.manual_seed(int(own))
    return torch.Generator().manual_seed(int(ours))


@contextmanager
def seeded(names: tuple[int, ...], device: torch.device) -> Iterator[torch.Generator]:
    """`seed_step` for the length of the block; behind it, torch's generators go on as if nothing had been drawn."""
    before = [Randomness.now(place) for place in {torch.device("cpu"), device}]
    try:
        yield seed_step(*names)
    finally:
        for state in before:
            state.restore()


@dataclass(frozen=True)
class Randomness:
    """The state of the generator that dropout on one device draws from."""

    device: torch.device
    state: Tensor

    @staticmethod
    def now(device: torch.device) -> Randomness:
        """The state at this moment. Does not wait for a GPU: the state is kept on the host."""
        on_gpu = device.type == "cuda"
        return Randomness(device, torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block, draw again what was drawn after this state; afterwards, continue as if it had not been."""
        after = Randomness.now(self.device)
        self.restore()
        try:
            yield
        finally:
            after.restore()

    def restore(self) -> None:
        """Go on from this state."""
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.state, self.device)
        else:
            torch.set_rng_state(self.state)
