"""What lies in folders of images: class folders and image files, and what is passed over, which the log names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from esam_dist.data.decode import SUFFIXES
from esam_dist.errors import UserError, printable

log = logging.getLogger(__name__)

TOOL_FOLDERS = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""Folders that programs leave behind, besides the hidden ones: no classes, and no photographs in them."""

_NAMED = 8


class Listing:
    """Looks into folders below `root`; remembers what it passed over, and follows no link out of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._inside = {root.resolve()}
        self._passed: dict[str, dict[str, None]] = {}

    def allow(self, folder: Path) -> None:
        """Links may lead into `folder`, which the user has given, wherever it is."""
        self._inside.add(folder.resolve())

    def folders(self, folder: Path) -> tuple[str, ...]:
        """The names of the folders in `folder`, in order. Raises UserError for one that cannot be printed."""
        names = []
        for entry in self._entries(folder):
            path = Path(entry.path)
            if path.is_dir():
                names += [] if self._is_left_behind(entry) else [entry.name]
            elif path.suffix.lower() in SUFFIXES and not self._is_left_behind(entry):
                self._pass("in no class's folder", path)
        if strange := [name for name in names if not name.isprintable()]:
            raise UserError(f"--from {folder}: the folder {strange[0]!r} has no name that can be printed; rename it")
        return tuple(names)

    def images(self, folder: Path) -> list[Path]:
        """The image files below `folder`, in order. Raises UserError for a link that leads out of the given folder."""
        if folder.is_symlink():
            self._check_link(folder)
        found, waiting = [], [folder]
        while waiting:
            for entry in self._entries(waiting.pop()):
                path = Path(entry.path)
                if self._is_left_behind(entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif path.suffix.lower() in SUFFIXES:
                    if entry.is_symlink():
                        self._check_link(path)
                    # To open a named pipe would be to wait for ever.
                    found.append(path) if path.is_file() else self._pass("no regular files", path)
                elif path.is_dir():
                    self._pass("links to folders", path)
        return sorted(found)

    def report(self) -> None:
        """Name in the log what was passed over."""
        for kind, names in self._passed.items():
            more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            log.warning("%s: passed over, %s: %s%s", self.root, kind, ", ".join([*names][:_NAMED]), more)
        self._passed.clear()

    def _entries(self, folder: Path) -> Sequence[os.DirEntry[str]]:
        try:
            return sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"--from {self.root}: {_shown(folder)} cannot be read ({error.strerror}); mend that, or move it away"
            ) from None

    def _is_left_behind(self, entry: os.DirEntry[str]) -> bool:
        """Whether the user did not make it: hidden, as resource forks are too (`._x.jpg`), or a program's folder."""
        left = entry.name.startswith(".") or entry.name in TOOL_FOLDERS
        if left:
            self._pass("left by programs, or hidden", Path(entry.path))
        return left

    def _pass(self, kind: str, path: Path) -> None:
        # Folders are looked into more than once, and an archive made by macOS has a hidden file for each image.
        self._passed.setdefault(kind, {})[_shown(path.relative_to(self.root))] = None

    def _check_link(self, path: Path) -> None:
        """Raise UserError for a link to what was not given: an unpacked archive could so take any image along."""
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._inside):
            raise UserError(
                f"--from {self.root}: {_shown(path.relative_to(self.root))} is a link to {_shown(real)}, outside of "
                "the folder; copy what it shows there, or remove it"
            )


def _shown(path: Path) -> str:
    return printable(str(path))
