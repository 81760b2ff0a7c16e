"""The endpoint of one rank, over real HTTP on loopback."""

import json
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from esam_dist.errors import UserError
from esam_dist.metrics import Metrics
from esam_dist.metrics.health import Pulse, Server
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks


def get(port, path, host="127.0.0.1", method="GET"):
    request = urllib.request.Request(f"http://{host}:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pulse(clock):
    return Pulse(60.0, clock)


@pytest.fixture
def server(pulse):
    registry = CollectorRegistry()
    Gauge("esam_step", "Updates.", registry=registry).set(7)
    built = Server(registry, pulse, "127.0.0.1", 0)
    yield built
    built.close()


def test_metrics_page_is_read_by_the_clients_own_parser(server):
    status, page = get(server.port, "/metrics")
    values = {sample.name: sample.value for f in text_string_to_metric_families(page) for sample in f.samples}
    assert status == 200
    assert values == {"esam_step": 7}


def test_ready_only_after_the_first_step(server, pulse):
    assert get(server.port, "/healthz")[0] == 200
    assert get(server.port, "/readyz")[0] == 503
    pulse.stepped(1)
    assert get(server.port, "/readyz")[0] == 200


def test_stall_makes_it_unhealthy_until_something_moves(server, pulse, clock):
    pulse.stepped(5)
    clock.now += 59
    assert get(server.port, "/healthz")[0] == 200
    clock.now += 2
    status, page = get(server.port, "/healthz")
    assert status == 503
    assert json.loads(page) == {"stalled": True, "ready": True, "step": 5, "idle_seconds": 61.0}
    assert get(server.port, "/readyz")[0] == 503
    assert get(server.port, "/metrics")[0] == 200
    pulse.beat("a batch")
    assert get(server.port, "/healthz")[0] == 200


def test_zero_stall_seconds_never_stalls(clock):
    pulse = Pulse(0.0, clock)
    clock.now += 1e9
    assert not pulse.report()["stalled"]


def test_other_paths_and_methods_are_refused(server):
    assert get(server.port, "/")[0] == 404
    assert get(server.port, "/metrics", method="POST")[0] == 405


def test_ipv6_address_is_served(pulse):
    try:
        server = Server(CollectorRegistry(), pulse, "::1", 0)
    except UserError:
        pytest.skip("no IPv6 loopback on this machine")
    assert get(server.port, "/healthz", host="[::1]")[0] == 200
    server.close()


def test_taken_port_is_one_line_with_key_value_and_remedy(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            Metrics(tmp_path, MetricsKeys(port=port - 1), Ranks(1, 1, 2), {})
    assert f"metrics.port = {port}" in str(error.value)
    assert "choose a free port" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bind", "port", "words"),
    [
        ("no address", 9100, "metrics.bind = no address is no address"),
        ("127.0.0.1", 65536, "metrics.port = 65536 for this local rank is beyond 65535"),
        ("192.0.2.1", 0, "metrics.bind = 192.0.2.1"),
    ],
)
def test_wrong_address_names_the_key(pulse, bind, port, words):
    with pytest.raises(UserError, match=words):
        Server(CollectorRegistry(), pulse, bind, port)


def test_endpoint_lives_until_close(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = Metrics(tmp_path, MetricsKeys(port=port), Ranks(), {}, Progress(planned_steps=1))
    assert "esam_planned_steps 1.0" in get(port, "/metrics")[1]
    metrics.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(port, "/metrics")
