"""The sections and keys of a configuration, with their defaults; those of `method` are in `esam_dist.methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from esam_dist.methods import ESAM, AnyMethod
from esam_dist.section import BelowOne, Count, Folder, NonNegative, Positive, Real, Section


class Run(Section):
    """Where the run lives, and what makes it repeatable."""

    folder: Folder = Path("runs/esam")
    """Everything the run writes: config, metrics, checkpoints, environment."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Weights, data order, augmentation, perturbed parameters and dropout are functions of it."""
    resume: str = "auto"
    """`auto`: continue from the newest valid checkpoint; `never`: a new run; else the path of a checkpoint."""


class Model(Section):
    """The network, by name."""

    name: str = "cifar_resnet8"
    """A torchvision classifier (`resnet50`, `vit_b_16`, ...) or one of ours (`cifar_resnet8`, ...)."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Outputs of the classifier; empty: as many as the data has classes."""


class Data(Section):
    """What is read, and how it becomes batches."""

    path: Folder = Path("data/digits")
    """Folder with `train` and `validation` shards, as `esam-dist prepare` writes it."""
    batch_size: Count = 64
    """Images per rank and micro-batch."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 decodes in the training process."""
    image_size: Count = 32
    """Height and width of the images that the network sees, in pixels."""
    augment: Literal["none", "shift", "imagenet"] = "shift"
    """`shift`: random crop after a zero border of 1/8; `imagenet`: random resized crop and flip."""
    progressive: list[Annotated[list[Count | NonNegative], Field(min_length=2, max_length=2)]] = []
    """`[[epoch, size], ...]`: from each epoch on, train at that size instead of `image_size`."""
    flip: bool = False
    """Mirror half of the training images; `augment: imagenet` always does."""
    crop_area: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    """`augment: imagenet`: smallest and largest share of the image's area in a crop."""
    antialias: bool = True
    """Average all pixels where a training crop shrinks; false: four neighbours only, faster on large originals."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Colour and shape distortions after the crop: RandAugment (two of `magnitude`) or TrivialAugment."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of `policy: randaugment`."""
    color_jitter: NonNegative = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.0
    """Probability that a rectangle of a training image is replaced by the mean colour."""
    mixup: NonNegative = 0.0
    """Alpha of mixup: each batch is blended with itself, shifted by one; labels become soft. 0: off."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix, likewise; with both on, each batch draws one of the two."""
    repeats: Count = 1
    """Times that each sample appears in a row, augmented anew; an epoch then visits 1 / repeats of the samples."""
    crop_ratio: Annotated[Real, Field(gt=0.0, le=1.0)] = 1.0
    """Validation sees this share of the shorter side, centred: 0.875 is resize 256, crop 224."""
    mean: Annotated[list[Real], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    """Subtracted from red, green and blue, in units of the full range."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    """Red, green and blue are divided by it, in units of the full range."""
    shuffle_window: Count = 16
    """Samples are shuffled within this many shards, themselves in shuffled order."""
    stream: str = ""
    """Training shards to draw from instead, for ever: `pipe:`, `http(s)://`, `s3://` with braces, `{000..146}`."""
    stream_samples: Annotated[int, Field(ge=0)] = 0
    """Samples of `stream` that count as one epoch."""
    stream_cache: Folder | None = None
    """Folder that keeps the shards of `stream` once they are fetched; empty: nothing is kept."""
    stream_tries: Count = 5
    """Attempts to fetch a shard of `stream`, with pauses of 0.5, 1, 2, ... seconds."""
    max_skipped: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.01
    """Largest share of the samples that may be unreadable. A rank that has met more than e + 4 sqrt(e) stops the run;
    e is this share of what it has read, but at least 1."""


class Train(Section):
    """How long, how precise, how chatty."""

    epochs: Annotated[Real | int, Field(gt=0)] = 20
    """Passes over the training data, whole or not; the learning rate's schedule spans them."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many updates, without changing the schedule; 0: no limit."""
    accumulate: Count = 1
    """Micro-batches per update: one perturbation and selection each, one all-reduce for all."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward passes; weights and updates stay in float32."""
    channels_last: bool = False
    """Weights and images with the channels innermost: faster convolutions on GPUs, at half precision above all."""
    compile: bool = False
    """Compile the network with `torch.compile`; with `swp: suffix` by block, for the ascent to stop at its cut."""
    label_smoothing: BelowOne = 0.0
    """Share of the target spread evenly over all classes."""
    average: Literal["none", "ema", "lawa"] = "none"
    """Average of the weights, validated too: `ema`: exponential, over all updates; `lawa`: the latest copies' mean."""
    average_decay: BelowOne = 0.999
    """For `average: ema`: the largest decay; in the first updates it is smaller."""
    average_last: Count = 5
    """For `average: lawa`: copies averaged, each as large as the weights, on the device."""
    average_every: Annotated[int, Field(ge=0)] = 0
    """For `average: lawa`: updates between two copies; 0: an epoch, as in the paper."""
    average_batches: Annotated[int, Field(ge=0)] = 32
    """Training batches per rank from which BatchNorm's statistics are recomputed for the average; 0: those of the raw
    weights are kept."""
    log_every: Count = 10
    """Updates between two rows of metrics; the host waits for the device only then."""
    validate_every: Count = 1
    """Epochs between two validations; the last epoch is always validated."""


class Optim(Section):
    """The base optimizer and its learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer that applies the sharpness-aware gradient."""
    lr: NonNegative = 0.1
    """Peak learning rate, for the global batch as it is (no hidden scaling)."""
    momentum: BelowOne = 0.9
    """SGD's momentum, or AdamW's beta1."""
    beta2: BelowOne = 0.999
    """AdamW's second-moment decay."""
    nesterov: bool = False
    """Nesterov's form of SGD's momentum."""
    weight_decay: NonNegative = 5e-4
    """L2 for SGD, decoupled for AdamW."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also applies to normalisation parameters and biases."""
    clip_grad_norm: NonNegative = 0.0
    """Largest global gradient norm of an update; 0: no clipping."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear warm-up from 0."""
    step_epochs: list[NonNegative] = []
    """For `schedule: step`: the epochs at which the rate is multiplied by `step_factor`."""
    step_factor: Annotated[Real, Field(gt=0.0, lt=1.0)] = 0.1
    """For `schedule: step`: the factor."""


class Engine(Section):
    """Who averages gradients and updates."""

    name: Literal["native", "deepspeed"] = "native"
    """`native`: one process or DDP; `deepspeed`: ZeRO."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage; at 3 all ranks share one perturbation (see docs/architecture.md)."""
    offload: bool = False
    """DeepSpeed keeps the optimizer's state and update on the CPU; needs `zero_stage` 1 or more."""
    # 600 is torch's own for NCCL, and no longer than `metrics.stall_seconds`: ranks that lost a peer are to fail by
    # themselves, with the reason in their log, before a probe ends them.
    collective_timeout_seconds: Positive = 600.0
    """A rank waits this long for the others, then fails: so a host that vanished is noticed. Longer than a checkpoint,
    which rank 0 writes while the others wait, and than the largest lead of a rank in a validation."""


class Checkpoint(Section):
    """What survives a failure."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Updates between two checkpoints; 0: only at the end of each epoch."""
    keep: Count = 2
    """Newest checkpoints kept; the best by validation accuracy is kept besides."""


class Metrics(Section):
    """Who may watch."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus endpoint of local rank 0; local rank r listens at port + r; 0: off."""
    bind: str = "127.0.0.1"
    """Address the endpoint listens on."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Progress on rank 0: a bar on a terminal, log lines elsewhere."""
    stall_seconds: NonNegative = 600.0
    """`/healthz` turns unhealthy when nothing moved for this long; longer than a checkpoint; 0: never."""
    gateway: str | None = None
    """Pushgateway (`http://host:9091`) that takes the final values of a job too short to be scraped."""


class Config(Section):
    """One training run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    method: AnyMethod = ESAM()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
