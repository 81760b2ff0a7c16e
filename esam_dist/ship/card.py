"""What must be known of weights to use them; a checkpoint holds it, and the sidecar of an exported file.

So neither the data's folder nor the configuration is needed to predict.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esam_dist import config
from esam_dist.data.dataset import Description, read_description
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from esam_dist.network import builder_options
from esam_dist.section import Positive, Real

log = logging.getLogger(__name__)

Channels = Annotated[list[Real], Field(min_length=3, max_length=3)]
Divisors = Annotated[list[Positive], Field(min_length=3, max_length=3)]


class _Facts(BaseModel):
    """Keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Data(_Facts):
    """Which images the network has learnt from."""

    name: str
    """What `prepare` has called them."""
    sha256: str
    """Over the class names and the checksums of all shards, as `dataset.json` lists them."""


class Card(_Facts):
    """Model, classes and pixels."""

    model: str
    """`model.name`."""
    options: dict[str, Any] = {}
    """What the network's builder was told besides."""
    num_outputs: Annotated[int, Field(ge=1, le=1_000_000)]
    """Length of the logits."""
    classes: list[str]
    """Names of the first outputs; all, unless `model.num_classes` asked for more."""
    image_size: Annotated[int, Field(ge=1, le=65_536)]
    """Height and width in pixels."""
    crop_ratio: Annotated[Real, Field(gt=0.0, le=1.0)]
    """Share of the shorter side that is seen, centred."""
    mean: Channels
    """Of red, green and blue, from 0 to 1; subtracted."""
    std: Divisors
    """Divides what is left."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which it was trained and validated; the weights are float32."""
    channels_last: bool = False
    """How weights and images lay in memory."""
    data: Data | None = None
    """None for a checkpoint of an earlier version."""

    def name(self, output: int) -> str:
        """The class of an output; its number, where the data had no such class."""
        return self.classes[output] if output < len(self.classes) else str(output)

    def keys(self, batch_size: int, workers: int) -> DataKeys:
        """The keys by which images become what the network sees."""
        return DataKeys(
            image_size=self.image_size,
            crop_ratio=self.crop_ratio,
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            workers=workers,
        )


class Sidecar(Card):
    """The file beside an exported one."""

    format: str
    """Of the file: safetensors, state_dict, onnx, torchscript or torch.export."""
    sha256: str
    """Of the file."""
    build: str
    """The Python expression for the network that takes the weights."""
    input: str
    """What the network takes."""
    preprocessing: str
    """From an image file to that."""
    output: str
    """What comes out."""
    run: str
    """Folder of the run."""
    checkpoint: str
    """Folder of the checkpoint."""
    step: int
    """Updates that were made."""
    averaged: bool
    """Whether the weights are `train.average`'s."""
    accuracy: float | None
    """Of these weights on the validation set; null where it was not measured."""
    versions: dict[str, str]
    """Of esam_dist, torch, and what else took part."""


def describe(cfg: config.Config, num_outputs: int) -> Card:
    """The card of a run. Raises UserError where its data cannot be read."""
    return _card(cfg, num_outputs, read_description(cfg.data.path))


def described_later(cfg: config.Config, num_outputs: int, path: Path) -> Card:
    """The card of a checkpoint at `path` that holds none: from the run's configuration, and its data if still there."""
    try:
        found: Description | None = read_description(cfg.data.path)
    except UserError:
        found = None
    if found is not None and len(found.classes) <= num_outputs:
        return _card(cfg, num_outputs, found)
    log.warning(
        "checkpoint %s: does not name its classes, as an earlier version wrote it, and its data is not at data.path = "
        "%s; numbers stand for their names",
        *(path, cfg.data.path),
    )
    return _card(cfg, num_outputs, None)


def parse(values: object, source: str) -> Card:
    """The card that a checkpoint holds. Raises UserError."""
    try:
        return Card.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: its card is damaged ({_fault(error)}); use another checkpoint") from None


def read_sidecar(file: Path) -> Sidecar:
    """The sidecar of an exported file. Raises UserError."""
    path = sidecar_path(file)
    try:
        return Sidecar.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"MODEL = {file}: its sidecar {path.name} cannot be read ({error.strerror}); keep the two files of "
            "`esam-dist export` together, or export again"
        ) from None
    except ValidationError as error:
        raise UserError(f"MODEL = {file}: {path.name} is damaged ({_fault(error)}); export again") from None


def sidecar_path(file: Path) -> Path:
    """Where the sidecar of an exported file lies."""
    return file.with_name(f"{file.name}.json")


def _card(cfg: config.Config, num_outputs: int, found: Description | None) -> Card:
    return Card(
        model=cfg.model.name,
        options=builder_options(cfg),
        num_outputs=num_outputs,
        classes=[] if found is None else found.classes,
        image_size=cfg.data.image_size,
        crop_ratio=cfg.data.crop_ratio,
        mean=cfg.data.mean,
        std=cfg.data.std,
        precision=cfg.train.precision,
        channels_last=cfg.train.channels_last,
        data=None if found is None else Data(name=found.name, sha256=_checksum(found)),
    )


def _checksum(found: Description) -> str:
    shards = {name: [shard.sha256 for shard in split.shards] for name, split in found.splits.items()}
    told = json.dumps({"classes": found.classes, "shards": shards}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
