"""How the program ends: with its status and all its output, and without the interpreter being taken apart."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from esam_dist import cli

class Finalised:
    def __del__(self, write=sys.stdout.write):
        write("finalised")

kept = Finalised()
atexit.register(lambda: sys.stdout.write("exit function, "))

def main():
    sys.stdout.write("output without a line's end, ")
    {end}

cli.main = main
cli.program()
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(2)", 2), ("sys.exit(143)", 143)],
)
def test_the_status_and_all_output_arrive_and_nothing_is_finalised(end, status):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == status
    assert ended.stdout == "output without a line's end, exit function, "


def test_an_error_that_is_not_the_users_keeps_its_traceback():
    program = PROGRAM.format(end="raise RuntimeError('ours')")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: ours" in ended.stderr
