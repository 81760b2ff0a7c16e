"""A streamed shard, fetched and made into a batch as training does it; the first byte says how it is packed."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import torch
from PIL import Image

from benchmarks.fuzz.targets.packed import BOMB, PACKED, tar_of, unpacked
from esam_dist.data import open_train
from esam_dist.data.dataset import DESCRIPTION, Description
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError


class StreamTarget:
    """See the module."""

    allowed = (UserError,)
    modules = ("data/stream.py", "data/fetch.py", "data/tar.py")
    memory_bytes = 1 << 30

    def __init__(self, folder: Path) -> None:
        self._shard = folder / "shard.tar"
        description = Description(format=2, name="few", classes=["a", "b"], splits={}, plan={})
        (folder / DESCRIPTION).write_text(description.model_dump_json())
        self._cfg = DataKeys(
            **{"path": folder, "stream": str(self._shard), "stream_samples": 2, "stream_tries": 1},
            **{"batch_size": 2, "workers": 0, "image_size": 8},
        )

    def seeds(self) -> list[bytes]:
        """Sound ones, packed in every way, a bomb, a key given twice, an image without a label."""
        image = io.BytesIO()
        Image.new("RGB", (4, 4), (10, 20, 30)).save(image, "PNG")
        sound = {f"{key}.{suffix}": part for key in "ab" for suffix, part in (("png", image.getvalue()), ("cls", b"1"))}
        tars = [
            tar_of(sound),
            tar_of({"a.png": image.getvalue(), "b.cls": b"0", "__x__": b"", "a/b.c.png": b"no image"}),
            tar_of({"a.cls": b"0", "a.png": image.getvalue(), "a.CLS": b"1"}),
        ]
        packed = [bytes([how]) + tar for how in range(len(PACKED)) for tar in tars]
        return [*packed, bytes([BOMB]) + tars[0]]

    def run(self, data: bytes) -> None:
        """See `Target`."""
        self._shard.write_bytes(unpacked(data))
        read = open_train(self._cfg, seed=0, rank=0, world_size=1, device=torch.device("cpu"))
        try:
            for batch in itertools.islice(read.batches(0), 1):
                assert batch.images.shape == (2, 3, 8, 8)
                assert bool(((batch.labels >= 0) & (batch.labels < 2)).all())
        finally:
            read.close()
