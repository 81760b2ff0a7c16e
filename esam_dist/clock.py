"""How long each phase of a step takes, without waiting for the device in the step."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class PhaseClock:
    """Stamps the end of each phase; `drain` turns the stamps into seconds.

    On a GPU the stamps are CUDA events, read only in `drain`, so that timing never stalls the queue of kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stamps: list[tuple[str, torch.cuda.Event | float]] = []
        self.latest = (time.monotonic(), "the start")
        """When the host last began or ended a phase, and which: a sign of life."""

    def start(self) -> None:
        """Begin a new interval: time before this call is not counted, time until the next `end` is."""
        self._stamps.append(("", self._now()))
        self.latest = (time.monotonic(), "the update before")

    def end(self, phase: str) -> None:
        """The time since the last stamp was spent in `phase` (data, ascent, score, select, descent, update, ...).

        Nothing is kept before the first `start`: not everyone who trains asks for times.
        """
        if not self._stamps:
            return
        self._stamps.append((phase, self._now()))
        self.latest = (time.monotonic(), f"phase {phase!r}")

    def drain(self) -> dict[str, list[float]]:
        """Seconds of every stamped phase since the last drain, by name and in order. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = defaultdict(list)
        for (_, before), (phase, after) in zip(self._stamps, self._stamps[1:], strict=False):
            if phase:
                seconds[phase].append(self._between(before, after))
        self._stamps = self._stamps[-1:]
        return dict(seconds)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def _between(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
        if isinstance(before, float) and isinstance(after, float):
            return after - before
        assert isinstance(before, torch.cuda.Event)
        assert isinstance(after, torch.cuda.Event)
        return float(before.elapsed_time(after)) / 1000.0
