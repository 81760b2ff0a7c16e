"""Real servers and tools for the tests of this folder: started on loopback, ended by their own process."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name):
    """The path of a program that the tests need, or a skip that says what to install."""
    path = shutil.which(name) or shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (Debian packages: docs/operations.md, 'Tools of the tests')")
    return path


def free_ports(count, host="127.0.0.1"):
    """`count` ports in a row that nobody listens on."""
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((host, 0))
            base = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for offset in range(1, count):
                    stack.enter_context(socket.socket()).bind((host, base + offset))
                return base
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def started(command, log, **kwargs):
    """Run `command` in the background with its output in the file `log`, and end it."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **kwargs)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def fetch(url, data=None, timeout=5):
    """Status and text of one HTTP request; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, data, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def until(condition, seconds, what, every=0.2):
    """Wait until `condition()` is truthy and return its value; fail naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    pytest.fail(f"after {seconds} s still not: {what}")


def query(port, expression):
    """What a Prometheus server on loopback answers to an instant query."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    status, text = fetch(url)
    assert status == 200, f"{expression}: {text}"
    return json.loads(text)["data"]["result"]
