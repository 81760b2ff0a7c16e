"""One target under atheris, in a process of its own: python -m benchmarks.fuzz.harness TARGET FOLDER [libFuzzer's].

Inputs lie in FOLDER/corpus. What should not come out does not end it: the first of its kind is kept in FOLDER/findings,
with its traceback beside it.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Fuzz until libFuzzer's arguments say enough."""
    import atheris

    name, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["esam_dist", "yaml"]):
        from benchmarks.fuzz.targets import TARGETS, attempt
    logging.disable()
    room, findings, corpus = (Path(folder) / part for part in ("room", "findings", "corpus"))
    for path in (room, findings, corpus):
        path.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name](room)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            attempt(target, data)
        except Exception as error:
            keep(findings, data, error)

    atheris.Setup([sys.argv[0], str(corpus), *options], once)
    atheris.Fuzz()


def keep(folder: Path, data: bytes, error: Exception) -> None:
    """Write an input and its traceback to `folder`, unless one of its kind is there."""
    kind = f"{type(error).__name__}-{place(error)}"
    if not (folder / f"{kind}.txt").exists():
        (folder / f"{kind}.bin").write_bytes(data)
        (folder / f"{kind}.txt").write_text("".join(traceback.format_exception(error)))


def place(error: Exception) -> str:
    """Where in the package, or in the target, `error` came from: the innermost file and line of ours."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    named = [frame for frame in ours if "esam_dist" in frame.filename or "targets" in frame.filename]
    return f"{Path(named[-1].filename).stem}-{named[-1].lineno}" if named else "unknown"


if __name__ == "__main__":
    main()
