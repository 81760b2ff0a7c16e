"""The configuration: a YAML file, and behind each byte 0xff, which no UTF-8 holds, a change on the command line."""

from __future__ import annotations

from pathlib import Path

from esam_dist import config
from esam_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


class ConfigTarget:
    """See the module. What is taken must be the same when it is written and read again."""

    allowed = (UserError,)
    modules = ("config/read.py", "config/strict_yaml.py", "config/secrets.py", "config/combinations.py")
    memory_bytes = 1 << 28

    def __init__(self, folder: Path) -> None:
        self._path, self._again = folder / "given.yaml", folder / "again.yaml"

    def seeds(self) -> list[bytes]:
        """The recipes, and one of each form of value."""
        recipes = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
        forms = [
            b"train: {epochs: 5e-1, accumulate: 0x1}\noptim: {lr: 1}\xffmethod.name=sam\xffmethod.rho=[[0, 1], [2, 5]]",
            b"method:\n  name: recycled\n  phase: {from: 0.5, to: 1}\n\xffdata.path='a b'\xfftrain.compile=yes",
            b'run: {folder: "a\\u00e4"}\ndata: {mean: [0.1, 0.2, 0.3], progressive: [[0, 16], [2, 32]]}\n',
            b"data: &a {path: x}\nrun: *a\n---\n!!python/object {}\n\xffoptim.lr=010",
        ]
        return [*recipes, *forms]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        text, *changes = data.split(b"\xff")
        self._path.write_bytes(text)
        loaded = config.load(self._path, [change.decode("utf-8", "surrogateescape") for change in changes])
        self._again.write_text(config.dump(loaded))
        assert config.load(self._again) == loaded, "reads otherwise than it was written"
