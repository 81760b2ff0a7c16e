"""The programs of docs/library.md do what their first lines say: each is taken from the page, and run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, TIMEOUT_SECONDS, environment

PAGE = (ROOT / "docs" / "library.md").read_text()
COMMAND = re.compile(r"# ((?:python|torchrun) .*)")
LAUNCHERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def commands(program: str) -> list[list[str]]:
    """What the first lines of a program say of how it is called."""
    found = []
    for line in program.splitlines():
        match = COMMAND.fullmatch(line)
        if match is None:
            return found
        found.append(shlex.split(match[1]))
    return found


PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAMES = [next(word for word in commands(program)[0] if word.endswith(".py")) for program in PROGRAMS]


def run(command: list[str], folder: Path) -> str:
    ended = subprocess.run(
        [*LAUNCHERS[command[0]], *command[1:]],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_page_shows_these_programs() -> None:
    assert NAMES == ["one_process.py", "ddp.py", "zero1.py", "text.py", "with_lightning.py"]


def assert_falls(out: str) -> None:
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) > 1
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("zero1.py", "with_lightning.py") else name
        for name in sorted({*NAMES} - {"ddp.py"})
    ],
)
def test_a_program_of_the_page_runs_and_its_loss_falls(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[NAMES.index(name)]
    (tmp_path / name).write_text(program)
    (command,) = commands(program)
    out = run(command, tmp_path)
    assert_falls(out)
    # Lightning's count of updates is ours.
    counts = re.findall(r"step (\d+) of (\d+)", out)
    assert bool(counts) == (name == "with_lightning.py")
    assert all(theirs == ours for theirs, ours in counts)


@pytest.mark.slow
def test_the_program_on_two_ranks_goes_on_where_it_was_and_trains_in_either_precision(tmp_path: Path) -> None:
    program = PROGRAMS[NAMES.index("ddp.py")]
    (tmp_path / "ddp.py").write_text(program)
    half, whole, in_float16 = commands(program)
    parts = [run(command, tmp_path) for command in (half, whole)]
    (tmp_path / "bfloat16.pt").unlink()
    out = run(whole, tmp_path)
    assert out == "".join(parts)
    assert_falls(out)
    assert_falls(run(in_float16, tmp_path))
