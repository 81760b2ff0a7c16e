"""Clients of the endpoint that mean no good: slow ones, many, garbage, lines without end. Scrapes are served beside."""

import contextlib
import http.client
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from esam_dist.metrics import clients
from esam_dist.metrics.clients import MAX_HEAD_BYTES
from esam_dist.metrics.health import Pulse, Server
from tests.commands import wait_for

FEW = 20
"""Connections that are held at a time, here."""
OTHERS = 20
"""Descriptors of a process that come and go."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(clients, "MAX_OPEN", FEW)
    registry = CollectorRegistry()
    Gauge("esam_step", "Updates.", registry=registry).set(7)
    built = Server(registry, Pulse(0.0), "127.0.0.1", 0)
    yield built
    built.close()


def scraped(port) -> str:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(client):
        client.request("GET", "/metrics")
        return client.getresponse().read().decode()


def connect(port) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def answer_to(port, request: bytes) -> bytes:
    """What comes back, until the server closes."""
    with connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(request)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                parts.append(part)
        return b"".join(parts)


def test_more_slow_clients_than_are_held_keep_no_scrape_waiting(server):
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    with contextlib.ExitStack() as held:
        slow = [held.enter_context(connect(server.port)) for _ in range(2 * FEW)]
        for client in slow:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET /met")
        for _ in range(3):
            start = time.monotonic()
            assert "esam_step 7.0" in scraped(server.port)
            assert time.monotonic() - start < 10
        assert threading.active_count() <= threads
        # This process holds the other ends too.
        assert len(os.listdir("/dev/fd")) <= files + len(slow) + FEW + OTHERS
        # The oldest went first.
        slow[0].settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert slow[0].recv(1) == b""
    wait_for(lambda: len(os.listdir("/dev/fd")) <= files + OTHERS)


def test_a_client_that_sends_byte_by_byte_is_ended_in_time(server, monkeypatch):
    monkeypatch.setattr(clients, "MAX_SECONDS", 0.3)
    with connect(server.port) as client:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 20:
                client.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < start + 20
    assert "esam_step" in scraped(server.port)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00garbage" * 20 + b"\r\n\r\n",
        b"GET " + b"/" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200_000 + b"\r\n",
        b"GET /metrics HTTP/1.1\r\nx: " + b"y" * (1 << 22) + b"\r\n\r\n",
        b"GET /%ff%00\xff HTTP/9.9\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET\r\n\r\n",
    ],
    ids=["garbage", "a long line", "many headers", "a long header", "odd bytes", "a body", "a word"],
)
def test_what_is_no_request_is_refused_and_the_next_one_is_served(server, capfd, request_):
    answer = answer_to(server.port, request_)
    # What is cut off behind a sound first line may be answered.
    assert answer == b"" or answer[:8] == b"HTTP/1.0" or b"Error" in answer
    assert "esam_step 7.0" in scraped(server.port)
    assert capfd.readouterr().err == ""


def test_a_request_is_read_no_further_than_its_bound(server):
    before = int(Path("/proc/self/statm").read_text().split()[1])
    head = b"GET /healthz HTTP/1.0\r\n" + b"a: " + b"b" * 2 * MAX_HEAD_BYTES
    with contextlib.ExitStack() as held:
        for _ in range(FEW):
            client = held.enter_context(connect(server.port))
            with contextlib.suppress(ConnectionError):
                client.sendall(head)
        assert "esam_step" in scraped(server.port)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) - before
        assert pages * os.sysconf("SC_PAGE_SIZE") < 64 * 2**20
