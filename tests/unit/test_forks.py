"""Forks of a process that has threads of gloo."""

import os
import warnings

import pytest

from esam_dist import ranks


@pytest.mark.parametrize(("in_a_group", "pauses"), [(True, [ranks.PAUSE_SECONDS]), (False, [])])
def test_a_fork_waits_a_moment_while_there_is_a_group(monkeypatch, in_a_group, pauses):
    ranks.pause_before_forks()
    ranks.pause_before_forks()  # once is enough
    slept = []
    monkeypatch.setattr(ranks.time, "sleep", slept.append)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: in_a_group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer interpreters warn of any fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert slept == pauses
