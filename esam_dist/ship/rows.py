"""Predictions as text: CSV or JSON lines, a row for each image."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from esam_dist.files import replacing


class Guess(NamedTuple):
    """One class that an image may show."""

    name: str
    output: int
    """Its place among the logits."""
    probability: float


Write = Callable[[str, list[Guess]], None]
"""Writes the row of an image: its path, and its guesses, the most probable first."""


def as_csv(file: TextIO, top: int) -> Write:
    """`path,class_1,probability_1,class_2,...`, below a line of these names."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = range(1, top + 1)
    writer.writerow(["path", *(f"{word}_{number}" for number in numbers for word in ("class", "probability"))])

    def write(path: str, guesses: list[Guess]) -> None:
        writer.writerow([path, *(word for guess in guesses for word in (guess.name, f"{guess.probability:.6f}"))])

    return write


def as_jsonl(file: TextIO, _: int) -> Write:
    """`{"path": ..., "predictions": [{"class": ..., "output": ..., "probability": ...}, ...]}`."""

    def write(path: str, guesses: list[Guess]) -> None:
        told = [{"class": name, "output": output, "probability": round(share, 6)} for name, output, share in guesses]
        file.write(json.dumps({"path": path, "predictions": told}, ensure_ascii=False) + "\n")

    return write


class Form(NamedTuple):
    """A form of output."""

    begin: Callable[[TextIO, int], Write]
    errors: str
    """How a name of a file that is no UTF-8 is encoded: CSV has its bytes, JSON an escape for each."""


FORMS = {"csv": Form(as_csv, "surrogateescape"), "jsonl": Form(as_jsonl, "backslashreplace")}


@contextmanager
def opened(output: Path | None, errors: str) -> Iterator[TextIO]:
    """A file that is at `output` when the block ends well, and not before; or standard output. UTF-8."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors=errors)
        yield sys.stdout
        sys.stdout.flush()
        return
    with replacing(output) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, newline="")
        yield text
        text.flush()
        text.detach()
