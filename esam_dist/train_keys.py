"""The keys of `train`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esam_dist.section import BelowOne, Count, Real, Section


class TrainKeys(Section):
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
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """`bce`: binary cross-entropy, each class a question of its own, as timm's recipes have it; wants another rate."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: a sample's loss is weighed inversely to the size of its class. Selection ranks the weighed losses."""
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
    max_skipped_updates: Annotated[int, Field(ge=0)] = 10
    """Updates in a row that may be skipped because the averaged gradient is not finite; one more stops the run."""
    check_replicas_every: Annotated[int, Field(ge=0)] = 100
    """Updates between two comparisons of the weights over all ranks, made with a row of metrics; also made before every
    checkpoint. A difference stops the run; 0: never."""
    validate_every: Count = 1
    """Epochs between two validations; the last epoch is always validated."""
