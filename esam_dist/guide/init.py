"""`esam-dist init DATA`: a configuration for a prepared folder that trains as it is, with the reasons beside it."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from pathlib import Path

from esam_dist import config
from esam_dist.config.strict_yaml import flow
from esam_dist.errors import UserError, printable
from esam_dist.files import write_file
from esam_dist.guide import proposal, survey
from esam_dist.guide.proposal import Proposal
from esam_dist.guide.survey import Device, Images, Network
from esam_dist.methods import METHODS

WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `esam-dist init` on `parser`."""
    parser.add_argument("data", type=Path, metavar="DATA", help="folder that `esam-dist prepare` has written")
    parser.add_argument("--model", metavar="NAME", help="network, see `esam-dist models` (default: by size and number)")
    parser.add_argument("--method", choices=list(METHODS), default="esam", metavar="NAME", help=f"{', '.join(METHODS)}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: DATA's name .yaml); -")


def run(args: argparse.Namespace) -> int:
    """Carry out `esam-dist init`. Raises UserError for what is no data, no network, or is there already."""
    out: Path = args.output or Path(f"{args.data.resolve().name}.yaml")
    to_stdout = str(out) == "-"
    if not to_stdout and out.exists():
        raise UserError(f"--output {printable(str(out))}: is there already; remove it, or give another file")
    images, device = survey.look_at_images(args.data), survey.look_at_device()
    size = proposal.image_size(images, device)
    network = survey.look_at_network(args.model or proposal.model(images, device), images.classes, size)
    text = written(out, images, device, network, args.method)
    if to_stdout:
        sys.stdout.write(text)
        return 0
    try:
        write_file(out, text)
    except OSError as error:
        raise UserError(
            f"--output {printable(str(out))}: cannot be written ({error.strerror}); give another file"
        ) from None
    config.load(out)
    print(f"written to {out}: {network.name} on {images.train} images of {network.image_size} pixels, {args.method}")  # noqa: T201
    print(f"train it with: esam-dist launch {shlex.quote(str(out))}")  # noqa: T201
    return 0


def written(out: Path, images: Images, device: Device, network: Network, method: str) -> str:
    """The file: sections with the keys that matter first, and why they are as they are."""
    chosen = proposal.propose(images, device, network)
    name = "my.yaml" if str(out) == "-" else str(out)
    parts = [
        _head(name, images, device),
        f"run: {flow({'folder': f'runs/{images.path.resolve().name}', 'seed': 0})}",
        _model(images, network),
        _data(images, device, network, chosen),
        _train(images, device, chosen),
        _optim(device, chosen),
        _method(method),
    ]
    return "\n".join(parts) + "\n"


def _comment(text: str, indent: int = 0) -> str:
    lines = textwrap.wrap(text, WIDTH - indent, break_on_hyphens=False, break_long_words=False)
    return "\n".join(f"{' ' * indent}# {line}" for line in lines)


def _head(name: str, images: Images, device: Device) -> str:
    where = f"{device.gpus} GPU(s) of {device.memory / 2**30:.0f} GiB" if device.gpus else f"{device.cores} CPU cores"
    return "\n".join(
        [
            _comment(
                f"{images.path}: {images.train} images to train on, {images.validation} to validate, {images.classes} "
                f"classes; their shorter side is {images.short_side} pixels (median)."
            ),
            _comment(f"Written by `esam-dist init` on a machine with {where}. Nothing here has been tuned: a start."),
            "# Train (started again, it goes on), try it out first, ask what a key means:",
            f"#   esam-dist launch {shlex.quote(name)}",
            f"#   esam-dist launch {shlex.quote(name)} train.epochs=3 run.folder=runs/first",
            "#   esam-dist train --config-help optim.lr",
        ]
    )


def _model(images: Images, network: Network) -> str:
    ratio = network.parameters / images.train
    few = f", {ratio:,.0f} for each image: with so few images, weights of a trained network help most" * (ratio > 2000)
    return "\n".join(
        [
            "model:",
            _comment(f"{network.parameters / 1e6:.1f} million parameters{few}. Others: `esam-dist models`.", 2),
            f"  name: {network.name}",
        ]
    )


def _data(images: Images, device: Device, network: Network, chosen: Proposal) -> str:
    photos = chosen.augment == "imagenet"
    lines = ["data:", f"  path: {flow(str(images.path))}"]
    if network.image_size < min(224, images.short_side) and not device.gpus:
        lines.append(_comment("Small, for a CPU: on a GPU 160 to 224 pixels are more accurate.", 2))
    elif network.image_size > images.short_side:
        lines.append(_comment("Larger than the images are: so the network wants it.", 2))
    lines += [
        f"  image_size: {network.image_size}",
        _comment("Per rank. Another one, or another number of ranks, wants another optim.lr: see there.", 2),
        f"  batch_size: {chosen.batch_size}",
        f"  workers: {chosen.workers}",
    ]
    if photos:
        lines += [
            _comment("Random crops, at least this share of an image, and mirrored ones.", 2),
            "  augment: imagenet",
            f"  crop_area: [{chosen.crop_area:g}, 1.0]",
            "  crop_ratio: 0.875",
        ]
    else:
        lines += [
            _comment("Moved by an eighth. Set flip to true where a mirrored image is of the same class.", 2),
            "  augment: shift",
            "  flip: false",
        ]
    return "\n".join(lines)


def _train(images: Images, device: Device, chosen: Proposal) -> str:
    updates = images.train // (chosen.batch_size * device.ranks)
    lines = [
        "train:",
        _comment(
            f"{updates} updates each. The rate falls to 0 over all of them: decide before, longer is better for few "
            "images.",
            2,
        ),
        f"  epochs: {chosen.epochs}",
        "  label_smoothing: 0.1",
        f"  log_every: {max(1, min(50, updates // 4))}",
    ]
    if chosen.precision != "fp32":
        lines += [f"  precision: {chosen.precision}", f"  channels_last: {flow(chosen.channels_last)}"]
    return "\n".join(lines)


def _optim(device: Device, chosen: Proposal) -> str:
    batch = chosen.batch_size * device.ranks
    sgd = chosen.optimizer == "sgd"
    rule = (
        f"{chosen.lr * 256 / batch:.2g} for 256 images, in proportion"
        if sgd
        else f"{proposal.ADAMW_PER_1024:g} for 1024 images, with the root"
    )
    return "\n".join(
        [
            "optim:",
            f"  name: {chosen.optimizer}",
            _comment(
                f"For {batch} images an update ({chosen.batch_size} on {device.ranks} rank(s)): {rule}. Nothing scales "
                "it: change it with the batch and the ranks. Too high a rate makes the loss rise.",
                2,
            ),
            f"  lr: {chosen.lr:g}",
            f"  warmup_epochs: {chosen.warmup_epochs}",
            "  schedule: cosine",
            "  momentum: 0.9",
            *(["  nesterov: true"] if sgd else ["  clip_grad_norm: 1.0"]),
            f"  weight_decay: {chosen.weight_decay:g}",
        ]
    )


def _method(name: str) -> str:
    fields = METHODS[name].model_fields
    shown = {key: fields[key].default.plain() for key in ("rho", "beta", "gamma") if key in fields}
    phase = [
        _comment("Plain updates first: from random weights they learn faster, and cost less.", 2),
        f"  phase: {{from: {proposal.SHARP_FROM:g}, to: 1.0}}",
    ]
    other = "sgd" if name != "sgd" else "esam"
    return "\n".join(
        [
            "method:",
            _comment(
                f"Whether it pays is for you to see: compare with method.name={other} run.folder=runs/{other} at the "
                f"same time, not the same epochs (`esam-dist compare`).",
                2,
            ),
            f"  name: {name}",
            *(f"  {key}: {value:g}" for key, value in shown.items()),
            *(phase if "phase" in fields else []),
        ]
    )
