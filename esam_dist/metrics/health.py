"""One small HTTP server per rank: `/metrics`, `/healthz`, `/readyz`.

`/healthz` answers 503 when nothing has moved for `stall_seconds`. A collective that waits for a lost rank blocks the
training thread, but not this server's. `/readyz` answers 200 from the first update on: then the ranks have met and the
data is there.

Whoever reaches the port must not slow the training: connections are bounded in number, bytes, seconds, and how fast
they are taken. Of too many at a time the oldest goes, since an honest one is over in milliseconds.
"""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from esam_dist.errors import UserError

StartResponse = Callable[..., Any]


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
            self._server = _Server(family, address)
        except OSError as error:
            key = "metrics.port" if error.errno != _ADDRESS_UNKNOWN else "metrics.bind"
            value = port if key == "metrics.port" else bind
            raise UserError(
                f"{key} = {value}: cannot listen on {bind}:{port} ({error.strerror}); "
                "choose a free port (each local rank adds its number), or metrics.port=0 for no endpoint"
            ) from None
        self._server.set_app(_app(registry, pulse))
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


_ADDRESS_UNKNOWN = 99  # EADDRNOTAVAIL: the machine has no such address


MAX_OPEN = 64
"""Connections at a time, of which each has a thread."""
MAX_SECONDS = 5.0
"""So long one may last."""
MAX_HEAD_BYTES = 16 * 1024
"""Of a request's first line and its headers."""
MAX_PER_SECOND = 200.0
"""Connections that are taken, in the long run; others wait in the kernel's queue."""
_QUEUE = 512


class _Handler(WSGIRequestHandler):
    timeout = MAX_SECONDS

    def setup(self) -> None:
        """See `StreamRequestHandler`."""
        super().setup()
        self.rfile = cast(io.BufferedIOBase, _Head(self.rfile))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: a scrape every few seconds would bury the log."""

    def get_stderr(self) -> Any:
        """Likewise of what a client makes go wrong."""
        return io.StringIO()


class _Head:
    """The lines of a request. Raises ConnectionAbortedError beyond MAX_HEAD_BYTES."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self._left = file, MAX_HEAD_BYTES
        self.close = file.close

    def readline(self, size: int) -> bytes:
        """As of files."""
        line = self._file.readline(min(size, self._left))
        self._left -= len(line)
        if self._left <= 0:
            raise ConnectionAbortedError
        return line


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _QUEUE

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...]) -> None:
        self.address_family = family
        self._turn = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._next = 0.0
        super().__init__(address[:2], _Handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up, which can hang where DNS does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve it in a thread of its own; in the place of the oldest where there are too many."""
        now = time.monotonic()
        # Up to a second's worth at once; beyond that, this thread waits, and the kernel's queue grows.
        self._next = max(self._next, now - 1.0) + 1.0 / MAX_PER_SECOND
        time.sleep(max(0.0, self._next - now))
        with self._turn:
            oldest = next(iter(self._open)) if len(self._open) >= MAX_OPEN else None
            self._open[request] = now
        if oldest is not None:
            self._end(oldest)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End what lasts too long, byte by byte perhaps; called several times a second."""
        with self._turn:
            late = [request for request, since in self._open.items() if time.monotonic() - since > MAX_SECONDS]
        for request in late:
            self._end(request)

    def shutdown_request(self, request: Any) -> None:
        """See `TCPServer`; called when it is over."""
        with self._turn:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up does not concern the training."""

    def _end(self, request: socket.socket) -> None:
        with self._turn:
            # Not counted any more; its thread wakes, sees the end, and closes it.
            if self._open.pop(request, None) is not None:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)


def _resolve(bind: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    if port > 65535:
        raise UserError(f"metrics.port = {port} for this local rank is beyond 65535; choose a lower base port")
    try:
        found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError(f"metrics.bind = {bind} is no address; give an IP such as 127.0.0.1 or 0.0.0.0") from None
    return found[0][0], found[0][4]


def _app(registry: CollectorRegistry, pulse: Pulse) -> Callable[[dict[str, Any], StartResponse], Iterable[bytes]]:
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
