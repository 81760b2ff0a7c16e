"""The rendezvous of a node that lost the network: it fails in time, once and for all."""

import threading
import time

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError

from esam_dist.launch.rendezvous import Impatient


class Store:
    """A backend that answers, hangs or raises."""

    name = "store"

    def __init__(self):
        self.connected = threading.Event()
        self.connected.set()
        self.error = None
        self.state = None

    def get_state(self):
        self.connected.wait()
        if self.error:
            raise self.error
        return self.state

    def set_state(self, state, token=None):
        self.connected.wait()
        self.state = state, token
        return state, token, True


def test_answers_pass_through():
    store = Impatient(Store(), 5)
    assert store.get_state() is None
    assert store.set_state(b"state", b"token") == (b"state", b"token", True)
    assert store.get_state() == (b"state", b"token")


def test_silence_is_an_error_and_the_connection_stays_lost_when_the_network_is_back():
    inner = Store()
    store = Impatient(inner, 0.2)
    inner.connected.clear()
    start = time.monotonic()
    with pytest.raises(RendezvousConnectionError, match=r"no answer within 0\.2 s"):
        store.get_state()
    assert time.monotonic() - start < 5
    inner.connected.set()
    with pytest.raises(RendezvousConnectionError):
        store.set_state(b"closed")
    assert inner.state is None


def test_lost_connection_stays_lost_and_other_errors_do_not():
    inner = Store()
    store = Impatient(inner, 5)
    inner.error = RendezvousStateError("corrupt")
    with pytest.raises(RendezvousStateError):
        store.get_state()
    inner.error = RendezvousConnectionError("reset")
    with pytest.raises(RendezvousConnectionError):
        store.get_state()
    inner.error = None
    with pytest.raises(RendezvousConnectionError, match="reset"):
        store.get_state()
