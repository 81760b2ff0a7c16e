"""One small HTTP server per rank: `/metrics`, `/healthz`, `/readyz`.

`/healthz` answers 503 when nothing has moved for `stall_seconds`. A collective that waits for a lost rank blocks the
training thread, but not this server's. `/readyz` answers 200 from the first update on: then the ranks have met and the
data is there.

Whoever reaches the port must not slow the training (see `clients`).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app

from esam_dist.errors import UserError
from esam_dist.metrics.clients import TICK_SECONDS, App, Clients, StartResponse

_QUEUE = 512
"""Connections that wait in the kernel to be taken."""


class Pulse:
    """When this process last made progress, and whether that is too long ago."""

    def __init__(self, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_seconds = stall_seconds
        self._clock = clock
        self.latest = (clock(), "the start")
        """When it last made progress, and which."""
        self.step = 0
        self.ready = False

    def beat(self, what: str) -> None:
        """Note that something moved."""
        self.latest = (self._clock(), what)

    def stepped(self, step: int) -> None:
        """Note that an update is finished."""
        self.step = step
        self.ready = True
        self.beat(f"update {step}")

    def report(self) -> dict[str, Any]:
        """What the probes answer: `stalled`, `ready`, `step`, `idle_seconds`."""
        idle = self._clock() - self.latest[0]
        stalled = 0 < self._stall_seconds < idle
        return {"stalled": stalled, "ready": self.ready, "step": self.step, "idle_seconds": round(idle, 3)}


class Server:
    """Serves `registry` and `pulse` at `bind`:`port` from a daemon thread, until closed.

    Raises UserError when the address cannot be bound. Port 0 takes a free port, which `port` then names.
    """

    def __init__(self, registry: CollectorRegistry, pulse: Pulse, bind: str, port: int) -> None:
        family, address = _resolve(bind, port)
        try:
            listener = _listening(family, address)
        except OSError as error:
            key = "metrics.port" if error.errno != _ADDRESS_UNKNOWN else "metrics.bind"
            value = port if key == "metrics.port" else bind
            raise UserError(
                f"{key} = {value}: cannot listen on {bind}:{port} ({error.strerror}); "
                "choose a free port (each local rank adds its number), or metrics.port=0 for no endpoint"
            ) from None
        self.port: int = listener.getsockname()[1]
        self._clients = Clients(listener, _app(registry, pulse))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._over.set()
        self._thread.join()
        self._clients.close()

    def _serve(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            self._clients.turn()


_ADDRESS_UNKNOWN = 99  # EADDRNOTAVAIL: the machine has no such address


def _listening(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[:2])
        listener.listen(_QUEUE)
    except OSError:
        listener.close()
        raise
    return listener


def _resolve(bind: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    if port > 65535:
        raise UserError(f"metrics.port = {port} for this local rank is beyond 65535; choose a lower base port")
    try:
        found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError(f"metrics.bind = {bind} is no address; give an IP such as 127.0.0.1 or 0.0.0.0") from None
    return found[0][0], found[0][4]


def _app(registry: CollectorRegistry, pulse: Pulse) -> App:
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path, report = environ.get("PATH_INFO"), pulse.report()
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", {"error": "only GET"})
        if path == "/metrics":
            pages: Iterable[bytes] = metrics(environ, start_response)
            return pages
        if path == "/healthz":
            return _answer(start_response, _status(not report["stalled"]), report)
        if path == "/readyz":
            return _answer(start_response, _status(report["ready"] and not report["stalled"]), report)
        return _answer(start_response, "404 Not Found", {"paths": ["/metrics", "/healthz", "/readyz"]})

    return app


def _status(good: bool) -> str:
    return "200 OK" if good else "503 Service Unavailable"


def _answer(start_response: StartResponse, status: str, values: dict[str, Any]) -> list[bytes]:
    body = json.dumps(values).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
