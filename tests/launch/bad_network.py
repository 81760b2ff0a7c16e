"""What a host sends is late and partly lost: by the kernel's netem, or by a relay where the kernel has none."""

import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import ip
from servers import tool

RELAY = Path(__file__).with_name("relay.py")
# A connection to a port where nobody listens is refused after one round trip.
ROUND_TRIPS = """
import contextlib, socket, sys, time
for _ in range(31):
    start = time.perf_counter()
    with socket.socket() as asks, contextlib.suppress(ConnectionRefusedError):
        asks.connect((sys.argv[1], 9))
    print(time.perf_counter() - start)
"""


def round_trip_seconds(host, other):
    """The median time from `host` to `other` and back."""
    return statistics.median(map(float, host.run(sys.executable, "-c", ROUND_TRIPS, other.address).split()))


class Loss:
    """How many frames were lost; known when the network is good again."""

    dropped: int


@contextlib.contextmanager
def slowed(host, *, delay_ms, jitter_ms, loss_percent):
    """Let what `host` sends be `delay_ms` +- `jitter_ms` late and lose `loss_percent` of it, for the block."""
    lost = Loss()
    rule = ["netem", "delay", f"{delay_ms}ms", f"{jitter_ms}ms", "loss", f"{loss_percent}%"]
    try:
        host.run(tool("tc"), "qdisc", "replace", "dev", "eth0", "root", *rule)
    except subprocess.CalledProcessError as error:
        with _relayed(host, lost, error.stderr.strip(), delay_ms / 1000, jitter_ms / 1000, loss_percent / 100):
            yield lost
        return
    yield lost
    shown = json.loads(host.run(tool("tc"), "-s", "-j", "qdisc", "show", "dev", "eth0"))
    lost.dropped = next(entry["drops"] for entry in shown if entry["kind"] == "netem")
    host.run(tool("tc"), "qdisc", "delete", "dev", "eth0", "root")


@contextlib.contextmanager
def _relayed(host, lost, no_netem, *numbers):
    near, far = f"near-{host.port}", f"far-{host.port}"
    program = [sys.executable, str(RELAY), near, far, *map(str, numbers)]
    command = ["ip", "netns", "exec", host.switch, *program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as relay:
        try:
            if relay.stdout.readline() != "ready\n":
                reason = relay.stderr.read().strip().splitlines()
                pytest.skip(f"no netem in this kernel ({no_netem}), and no TAP device: {reason[-1:]}")
            # the others have learned it, and would ask for another only after most of a minute
            address = host.run("cat", "/sys/class/net/eth0/address").strip()
            ip("-n", host.namespace, "link", "delete", "eth0")
            ip("-n", host.switch, "link", "set", far, "address", address, "netns", host.namespace, "name", "eth0")
            ip("-n", host.switch, "link", "set", near, "master", "bridge", "up")
            host.port = near
            host.connect()
            yield
        finally:
            relay.terminate()
            lost.dropped = json.loads(relay.stdout.read() or "{}").get("dropped", 0)
