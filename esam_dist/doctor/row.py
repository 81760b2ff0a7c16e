"""A row of the table, and how long a check may take to fill it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from esam_dist.errors import printable

LONGEST = 160


class Row(NamedTuple):
    """What a check found; `remedy` is empty where all is well."""

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Row:
    """All is well."""
    return Row(check, "ok", found)


def warn(check: str, found: str, remedy: str) -> Row:
    """It will do, but not for all, or not well."""
    return Row(check, "warn", found, remedy)


def fail(check: str, found: str, remedy: str) -> Row:
    """No run can go well."""
    return Row(check, "fail", found, remedy)


def bounded(name: str, check: Callable[[], Sequence[Row]], seconds: float) -> list[Row]:
    """The rows of `check`; one that says so where it raises, or has none after `seconds`."""
    rows: list[Row] = []

    def carry_out() -> None:
        try:
            rows.extend(check())
        except Exception as error:  # whatever is broken on this machine: it is what is asked about
            told = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:LONGEST]
            rows.append(fail(name, told, "mend what this names; the other rows may say why"))

    # A daemon: what hangs in a driver or a dead file server cannot be ended, only left behind.
    thread = threading.Thread(target=carry_out, daemon=True)
    thread.start()
    thread.join(seconds)
    # A copy, and only of a check that is over: a late one must not add rows below.
    late = [fail(name, f"no answer within {seconds:g} s", "something hangs: a driver, a file server, a name server")]
    return late if thread.is_alive() else list(rows)
