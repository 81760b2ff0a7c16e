"""The clients of a port in a process that trains: whoever they are, they take little of its interpreter.

One thread looks after all of them, 20 times a second. A thread for each connection, as of Python's own servers, doubled
the time of a step beside 500 clients that came, sent a byte now and then, and came again (benchmarks/endpoint): every
thread that wakes up takes the interpreter from the training. Here a silent connection costs nothing, and what all may
cost in a turn is bounded: connections taken, bytes read, answers given. Of too many at a time the oldest goes, since an
honest one is over in a turn or two.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

StartResponse = Callable[..., Any]
App = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
"""As WSGI has it; it is told the method, the path and what formats are accepted."""

TICK_SECONDS = 0.05
MAX_OPEN = 256
"""Connections at a time; each is a descriptor."""
MAX_NEW = 5
"""Connections taken in a turn; others wait in the kernel's queue."""
MAX_ANSWERS = 2
"""Requests answered in a turn: a page of metrics takes milliseconds to write."""
MAX_SECONDS = 10.0
"""So long a connection may last."""
LINGER_SECONDS = 0.5
"""So long it may last beyond its answer."""
MAX_HEAD_BYTES = 16 * 1024
"""Of a request's first line and its headers."""
_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ")
_PASSED_ON = {b"accept": "HTTP_ACCEPT", b"accept-encoding": "HTTP_ACCEPT_ENCODING"}


class Client:
    """One connection: what it has sent so far, then what it is still to get."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.head = bytearray()
        self.answer: memoryview | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of a request's head has come, or more than may."""
        return b"\r\n\r\n" in self.head or b"\n\n" in self.head or len(self.head) > MAX_HEAD_BYTES

    def read(self) -> bool:
        """Take what has come; whether the connection goes on. Raises OSError."""
        data = self.connection.recv(MAX_HEAD_BYTES)
        if self.answer is None:
            self.head += data
        return bool(data)

    def write(self) -> None:
        """Give as much of the answer as is taken, and no more after its end. Raises OSError."""
        if self.answer:
            self.answer = self.answer[self.connection.send(self.answer) :]
        if self.answer is not None and not self.answer:
            self.connection.shutdown(socket.SHUT_WR)


class Clients:
    """All connections to `listener`, whose requests `app` answers; `turn` is called again and again."""

    def __init__(self, listener: socket.socket, app: App) -> None:
        self._listener, self._app = listener, app
        listener.setblocking(False)
        self._open: dict[socket.socket, Client] = {}
        self._waiting: dict[socket.socket, Client] = {}
        """Those whose requests have come."""
        self._selector = selectors.DefaultSelector()

    def turn(self) -> None:
        """Take new ones, read, answer, and end those that last too long. Waits for nothing."""
        self._take()
        for key, events in self._selector.select(0):
            self._serve(key.data, events)
        for connection, client in list(self._waiting.items())[:MAX_ANSWERS]:
            del self._waiting[connection]
            self._answer(client)
        late = time.monotonic() - MAX_SECONDS
        for client in [client for client in self._open.values() if client.since < late]:
            self._end(client)

    def close(self) -> None:
        """End all, and listen no more."""
        for client in list(self._open.values()):
            self._end(client)
        self._selector.close()
        self._listener.close()

    def _take(self) -> None:
        for _ in range(MAX_NEW):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # there is none, or no descriptor is left
                return
            connection.setblocking(False)
            if len(self._open) >= MAX_OPEN:
                self._end(next(iter(self._open.values())))
            client = self._open[connection] = Client(connection)
            self._selector.register(connection, selectors.EVENT_READ, client)

    def _serve(self, client: Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                client.write()
                if not client.answer:
                    self._selector.modify(client.connection, selectors.EVENT_READ, client)
            elif not client.read():
                self._end(client)
            elif client.answer is None and client.is_complete:
                self._waiting[client.connection] = client
                # No more of it, until it is its turn.
                self._selector.unregister(client.connection)
        except BlockingIOError:
            return
        except OSError:
            self._end(client)

    def _answer(self, client: Client) -> None:
        try:
            answer = answered(self._app, bytes(client.head))
        except Exception:  # no client may end the thread that serves all
            answer = _page(HTTPStatus.INTERNAL_SERVER_ERROR)
        client.answer = memoryview(answer)
        client.head.clear()
        client.since = time.monotonic() - MAX_SECONDS + LINGER_SECONDS
        try:
            client.write()
        except BlockingIOError:
            pass
        except OSError:
            self._end(client)
            return
        # Read to its end: to close what has unread bytes would take the answer back.
        self._selector.register(
            client.connection, selectors.EVENT_WRITE if client.answer else selectors.EVENT_READ, client
        )

    def _end(self, client: Client) -> None:
        self._open.pop(client.connection, None)
        self._waiting.pop(client.connection, None)
        with suppress(OSError, ValueError, KeyError):
            self._selector.unregister(client.connection)
        client.connection.close()


def answered(app: App, head: bytes) -> bytes:
    """The whole answer to a request's `head`, of which the first line must be one of HTTP."""
    if len(head) > MAX_HEAD_BYTES:
        return _page(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    first, *lines = head.replace(b"\r\n", b"\n").split(b"\n")
    words = first.split(b" ")
    if not first.startswith(_METHODS) or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _page(HTTPStatus.BAD_REQUEST)
    path, _, query = words[1].decode("latin-1").partition("?")
    environ = {"REQUEST_METHOD": words[0].decode("latin-1"), "PATH_INFO": path, "QUERY_STRING": query}
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() in _PASSED_ON:
            environ[_PASSED_ON[name.lower()]] = value.strip().decode("latin-1")
    told: list[str] = []

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        told.extend([f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in headers), "Connection: close"])

    body = b"".join(app(environ, start_response))
    return "\r\n".join([*told, "\r\n"]).encode("latin-1") + (b"" if words[0] == b"HEAD" else body)


def _page(status: HTTPStatus) -> bytes:
    return f"HTTP/1.0 {status.value} {status.phrase}\r\nConnection: close\r\n\r\n".encode("latin-1")
