"""The bar on a terminal: nothing is cut off, however narrow it is."""

import contextlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

from esam_dist.metrics.console import fitting
from esam_dist.metrics.rows import TrainRow
from tests.commands import ROOT

VALUES = {
    "step": 12345,
    "epoch": 123.45,
    "loss": 2.3026,
    "lr": 0.000123,
    "grad_norm": 1.0,
    "sharpness": 0.1234,
    "kept_fraction": 0.5,
    "images_per_second": 12345.0,
}
ROW = TrainRow(**{name: VALUES.get(name, 0.0) for name in TrainRow.__dataclass_fields__})

PROGRAM = """
import sys
from esam_dist.metrics.console import ProgressBar
from tests.unit.test_progress_bar import ROW
bar = ProgressBar(112590)
bar.progress(12344)
bar.train(ROW)
bar._bar.mininterval = 0
bar.progress(12345)
bar._bar.refresh()
bar.close()
"""


def test_what_matters_most_is_kept():
    assert fitting(ROW, 200).split("  ")[0] == "epoch 123.45"
    assert fitting(ROW, 30) == "epoch 123.45  loss 2.3026"
    assert fitting(ROW, 12) == "loss 2.3026"
    assert fitting(ROW, 3) == ""


def on_terminal(columns):
    """What the bar writes to a terminal of so many columns."""
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=side, cwd=ROOT, env=env) as process:
        os.close(side)
        told = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while part := os.read(main, 65536):
                told += part
        assert process.wait(120) == 0
    os.close(main)
    return re.split(r"[\r\n]+", told.decode())


@pytest.mark.parametrize("columns", [80, pytest.param(100, marks=pytest.mark.slow)])
def test_nothing_is_cut_off_at(columns):
    lines = [line for line in on_terminal(columns) if "loss" in line]
    assert lines
    for line in lines:
        assert len(line) <= columns
        assert "loss 2.3026" in line
        assert re.search(r"(img/s|loss 2.3026)\s*$", line), line
