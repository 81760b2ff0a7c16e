"""A scraper as Prometheus is one: it reads every rank's metrics port, for ever."""

from __future__ import annotations

import random
import re
import socket
import threading
import urllib.request
from contextlib import closing

STEP = re.compile(rb"^esam_step ([0-9.e+]+)", re.MULTILINE)


class Scraper:
    """Counts what the `ports` answer, and keeps the last step that was told."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self.answered = self.failed = self.step = 0

    def run(self, over: threading.Event, every_seconds: float) -> None:
        """Scrape until `over` is set."""
        while not over.wait(every_seconds):
            for port in self._ports:
                self._scrape(port)

    def _scrape(self, port: int) -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                found = STEP.search(answer.read())
        except OSError:
            self.failed += 1
            return
        self.answered += 1
        self.step = max(self.step, int(float(found[1])) if found else 0)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below those of outgoing connections."""
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
