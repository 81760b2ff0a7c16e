"""How `--rendezvous` is read: names and addresses, of IPv6 too, with a port or without."""

import pytest
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from esam_dist.errors import UserError
from tests.jobs import job


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [
        ("head", "head", 29500),
        ("node-0.example:1234", "node-0.example", 1234),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("::1", "::1", 29500),
        ("fd00::2", "fd00::2", 29500),
        ("[::1]", "::1", 29500),
        ("[fd00::2]:1234", "fd00::2", 1234),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1", 29500),
    ],
)
def test_host_and_port_reach_torch_as_they_are_meant(given, host, port):
    wanted = job("--nnodes=1:2", f"--rendezvous={given}")
    assert (wanted.host, wanted.port) == (host, port)
    assert parse_rendezvous_endpoint(wanted.meeting_point, 1) == (host, port)


@pytest.mark.parametrize(
    "given",
    [
        *(":29500", ":", "head:", "head:port", "head:0", "head:65536", "head:-1", "head:\N{SUPERSCRIPT TWO}", "a b:80"),
        *("head:80:80", "fd00::2:29500", "::1::2", "[]", "[]:80", "[head]:80"),
        *("[::1", "::1]", "[::1]80", "[::1]:", "[::1]:0", "[[::1]]"),
    ],
)
def test_what_is_no_host_with_a_port_is_refused(given):
    with pytest.raises(UserError, match=r"^--rendezvous .*: give HOST or HOST:PORT of node 0; an IPv6 address as \["):
        job("--nnodes=2", f"--rendezvous={given}")
