"""Values that are fine alone and make no sense together: each refused in one line that says why and what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from esam_dist import selection
from esam_dist.config.secrets import looks_secret, shown
from esam_dist.errors import UserError

if TYPE_CHECKING:
    from esam_dist.config.sections import Config


def check(config: Config) -> None:
    """Raise UserError for the first combination in `config` that is refused."""
    for is_refused, reason in faults(config):
        if is_refused:
            raise UserError(reason)


def faults(config: Config) -> Faults:
    """All that is ever refused, in an order that does not depend on `config`: whether it is here, and the words."""
    own = [*_out_of_range(config), *_data(config), *_optimizer(config), *_method(config), *_engine(config)]
    return [*own, *_metrics(config), *_stream(config)]


Faults = list[tuple[bool, str]]


def _out_of_range(config: Config) -> Faults:
    method = config.method
    beta, gamma = (
        next((value for value in schedule.values() if not 0.0 < value <= 1.0), 1.0)
        for schedule in (method.beta, method.gamma)
    )
    rho = min(method.rho.values())
    return [
        (beta != 1.0, f"method.beta = {beta:g} is out of range; give a share in (0, 1]"),
        (gamma != 1.0, f"method.gamma = {gamma:g} is out of range; give a share in (0, 1]"),
        (rho < 0.0, f"method.rho = {rho:g} is negative; give a radius >= 0"),
    ]


def _data(config: Config) -> Faults:
    progressive = config.data.progressive
    epochs, sizes = [epoch for epoch, _ in progressive], [size for _, size in progressive]
    return [
        (
            any(size < 1 or size != int(size) for size in sizes),
            f"data.progressive = {progressive}: a size is a whole number of pixels; write [[epoch, size], ...]",
        ),
        (
            epochs != sorted(set(epochs)),
            f"data.progressive = {progressive}: each entry begins after the one before; sort them by epoch",
        ),
    ]


def _optimizer(config: Config) -> Faults:
    optim = config.optim
    return [
        (
            optim.nesterov and (optim.name != "sgd" or optim.momentum == 0.0),
            "optim.nesterov = true needs optim.name = sgd and optim.momentum > 0; set it to false",
        ),
        (
            optim.schedule == "step" and not optim.step_epochs,
            "optim.schedule = step needs optim.step_epochs, such as [30, 60, 80]",
        ),
    ]


def _method(config: Config) -> Faults:
    method, esam = config.method, config.method.name == "esam"
    whole = method.swp == "tensor" and set(method.beta.values()) == {1.0}
    begins, epochs = method.start_epoch, config.train.epochs
    size = method.group_size or config.data.batch_size
    lone = _lone_part(config, size)
    return [
        (
            method.name != "sgd" and begins >= epochs,
            f"method.start_epoch = {begins:g} lies behind the last of train.epochs = {epochs}: no step would be "
            "sharpness-aware; start sooner, or give method.name = sgd",
        ),
        (
            method.descent != "kept" and not (esam and whole),
            f"method.descent = {method.descent} recycles the gradient of all weights: it needs method.name = esam, "
            "method.swp = tensor and method.beta = 1",
        ),
        (
            method.descent == "recycled_exact" and (method.score != "random" or method.scope != "rank"),
            "method.descent = recycled_exact chooses the samples before any pass: it needs method.score = random "
            "and method.scope = rank",
        ),
        (
            method.descent == "recycled_exact" and lone > 0,
            "method.descent = recycled_exact passes the samples kept and the rest apart, two or more in each: "
            f"method.gamma = {method.gamma.plain()} comes to keep {lone} of {size}; give another gamma (as a list it "
            "passes over values), larger batches, or descent = recycled",
        ),
        (
            method.transport == "thresholds" and method.scope != "global",
            "method.transport = thresholds exchanges them between ranks: it needs method.scope = global",
        ),
        (
            method.capacity_factor > 0.0 and method.scope != "global",
            "method.capacity_factor limits a rank's share of a global selection: it needs method.scope = global",
        ),
        (
            0.0 < method.capacity_factor < 1.0,
            f"method.capacity_factor = {method.capacity_factor:g} would keep fewer than gamma; give at least 1, or 0",
        ),
        (
            method.group_size > 0 and esam and method.scope != "rank",
            "method.group_size selects within each group: it needs method.scope = rank",
        ),
        (
            method.group_size > 0 and config.data.batch_size % method.group_size != 0,
            f"method.group_size = {method.group_size} does not divide data.batch_size = {config.data.batch_size}",
        ),
        (
            method.name == "looksam" and method.interval == 1,
            "method.name = looksam reuses a direction between perturbations: give method.interval > 1, such as 5",
        ),
        (
            method.name == "looksam" and (config.train.accumulate > 1 or method.group_size > 0),
            "method.name = looksam remembers one flat part per update: it needs train.accumulate = 1 and "
            "method.group_size = 0",
        ),
        (
            method.name == "msam" and config.optim.momentum == 0.0,
            "method.name = msam perturbs along the momentum: give optim.momentum > 0",
        ),
    ]


def _lone_part(config: Config, size: int) -> int:
    """How many of `size` samples are kept when these, or the rest, are a single one, if it ever comes to that; else 0.

    A rest of none is fine: there is nothing to recycle then.
    """
    schedule = config.method.gamma
    numbers = [selection.num_kept(gamma, size) for gamma in schedule.values()]
    visited = range(min(numbers), max(numbers) + 1) if schedule.linear else numbers
    return next((kept for kept in visited if kept < size and min(kept, size - kept) == 1), 0)


def _engine(config: Config) -> Faults:
    engine, method, train = config.engine, config.method, config.train
    deepspeed = engine.name == "deepspeed"
    zero3 = engine.name == "deepspeed" and engine.zero_stage == 3
    whole = method.name in ("sgd", "sam") or (method.name == "esam" and set(method.beta.values()) == {1.0})
    return [
        (
            zero3 and not (whole and method.swp == "tensor" and method.descent == "kept" and method.group_size == 0),
            "engine.zero_stage = 3 shards the weights, so that all ranks share one perturbation of all of them: use "
            "method.name = sgd or sam, or esam with beta = 1, swp = tensor, descent = kept and group_size = 0; "
            "or zero_stage 0, 1 or 2",
        ),
        (
            deepspeed and engine.zero_stage == 0 and train.precision == "fp16",
            "train.precision = fp16 needs engine.zero_stage 1, 2 or 3, where DeepSpeed checks for overflow over all "
            "ranks; or engine.name = native; or train.precision = bf16",
        ),
        (
            engine.offload and not (deepspeed and engine.zero_stage > 0),
            "engine.offload = true is DeepSpeed's: it needs engine.name = deepspeed and engine.zero_stage 1, 2 or 3",
        ),
        (
            zero3 and engine.offload,
            "engine.offload = true moves the averaged gradient away, along which engine.zero_stage = 3 perturbs; "
            "use zero_stage 1 or 2",
        ),
        (
            zero3 and train.accumulate > 1,
            "engine.zero_stage = 3 needs the averaged gradient of one batch: give train.accumulate = 1, or "
            "zero_stage 0, 1 or 2",
        ),
    ]


def _metrics(config: Config) -> Faults:
    gateway = config.metrics.gateway or ""
    return [
        (
            "@" in gateway,  # the value is not repeated: it would stand in the log
            "metrics.gateway: holds a password, which config.yaml would keep; let the network protect the gateway",
        ),
        (
            bool(gateway) and not _is_http(gateway),
            f"metrics.gateway = {shown(gateway)} is no address; give http://HOST:9091",
        ),
    ]


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port  # raises for what is no port
    except ValueError:
        return False
    plain = re.fullmatch(r"[!-~]+", url) and re.fullmatch(r"[\w.:-]+", parts.hostname or "")
    return bool(plain) and port != 0 and parts.scheme in ("http", "https") and not parts.query


def _stream(config: Config) -> Faults:
    # Not repeated either. This finds the usual forms, not every secret.
    reason = (
        "data.stream: holds what looks like a password, token or signature, which config.yaml and logs would keep; put "
        "it in an environment variable and write ${NAME} there (on a command line in single quotes)"
    )
    return [(looks_secret(config.data.stream), reason)]
