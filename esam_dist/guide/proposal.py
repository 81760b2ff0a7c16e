"""What to begin with, as a function of the images, the device and the network: nothing is looked at here."""

from __future__ import annotations

from dataclasses import dataclass

from esam_dist.guide.survey import Device, Images, Network

TINY = 40
"""Pixels up to which images are taken for icons or digits: a network without a stem, no mirroring, no zoom."""
PHOTO_SIZES = (224, 192, 160, 128, 96, 64)
CPU_SIZE = 96
"""Largest size proposed for a CPU."""
FEW = 50_000
"""Images below which a small network, and crops that are not too small, generalise better."""
SGD_PER_256, SGD_FEW_PER_256, ADAMW_PER_1024 = 0.1, 0.05, 1e-3
"""Rates of Goyal et al. 2017 for SGD (linear in the batch), half of it for few images, where an epoch of warm-up is few
updates; of the ViT papers for AdamW (with the batch's root)."""
SHARP_FROM = 0.5
"""Share of the training before a method is sharpness-aware: in the first epochs from random weights it slows learning,
and the choice of the hardest samples makes the loss rise."""
MEMORY_SHARE, COPIES = 0.5, 1.5
"""Of a GPU's memory for activations, each of which needs about so many times its size."""
MOST_PER_GPU = 256
LEAST_UPDATES = 8
"""Updates in an epoch, at least."""


@dataclass(frozen=True)
class Proposal:
    """The values of a first configuration."""

    batch_size: int
    """Per rank."""
    workers: int
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    warmup_epochs: int
    precision: str
    channels_last: bool
    augment: str
    crop_area: float
    """Smallest share of an image in a crop."""


def image_size(images: Images, device: Device) -> int:
    """What the network is to see, in pixels: not more than there is, and what the device can do."""
    if images.short_side <= TINY:
        return 32 if images.short_side < 28 else -(-images.short_side // 4) * 4
    most = 224 if device.gpus else CPU_SIZE
    return next((size for size in PHOTO_SIZES if size <= min(most, images.short_side)), PHOTO_SIZES[-1])


def model(images: Images, device: Device) -> str:
    """The network for so many images of that size."""
    if images.short_side <= TINY:
        return "cifar_resnet18" if device.gpus and images.train >= 20_000 else "cifar_resnet8"
    return "resnet50" if device.gpus and images.train >= FEW else "resnet18"


def propose(images: Images, device: Device, network: Network) -> Proposal:
    """The rest, for a network."""
    batch = batch_size(images, device, network)
    tiny, few = images.short_side <= TINY, images.train < FEW
    epochs = 90 if device.gpus and not few else 100 if device.gpus else 20
    return Proposal(
        batch_size=batch,
        workers=min(8, max(1, device.cores // device.ranks)) if device.gpus else min(1, device.cores - 1),
        optimizer="sgd" if network.has_batchnorm else "adamw",
        lr=rate(batch * device.ranks, sgd=network.has_batchnorm, few=few),
        weight_decay=0.05 if not network.has_batchnorm else 5e-4 if few else 1e-4,
        epochs=epochs,
        warmup_epochs=max(1, epochs // 20),
        precision="bf16" if device.has_bfloat16 else "fp32",
        channels_last=device.has_bfloat16 and network.has_batchnorm,
        augment="shift" if tiny else "imagenet",
        crop_area=0.25 if few else 0.08,
    )


def batch_size(images: Images, device: Device, network: Network) -> int:
    """A power of two that the memory holds, and that leaves an epoch some updates."""
    most = min(MOST_PER_GPU, MEMORY_SHARE * device.memory / (COPIES * network.activations)) if device.gpus else 32
    most = min(most, images.train / (LEAST_UPDATES * device.ranks))
    if not device.gpus and images.train < 2_000:
        most = min(most, 16)
    batch = 1
    while 2 * batch <= most:
        batch *= 2
    return batch


def rate(global_batch: int, *, sgd: bool, few: bool) -> float:
    """The peak rate for a global batch, to two digits."""
    value = (
        (SGD_FEW_PER_256 if few else SGD_PER_256) * global_batch / 256
        if sgd
        else ADAMW_PER_1024 * (global_batch / 1024) ** 0.5
    )
    return float(f"{value:.2g}")
