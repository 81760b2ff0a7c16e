"""Values that are fine alone and make no sense together: each refused in one line that says why and what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from esam_dist.averaging import zero3_fault
from esam_dist.config.secrets import looks_secret, shown
from esam_dist.errors import UserError
from esam_dist.methods import Setup
from esam_dist.methods.needs import zero3_refusal
from esam_dist.section import Faults

if TYPE_CHECKING:
    from esam_dist.config.sections import Config


def check(config: Config) -> None:
    """Raise UserError for the first combination in `config` that is refused."""
    for is_refused, reason in faults(config):
        if is_refused:
            raise UserError(reason)


def faults(config: Config) -> Faults:
    """All that is ever refused, in an order that does not depend on `config`: whether it is here, and the words."""
    own = [*config.data.faults(), *config.optim.faults(), *_method(config), *_engine(config)]
    return [*own, *_metrics(config), *_stream(config), *_classes(config)]


def _method(config: Config) -> Faults:
    setup = Setup(config.data.batch_size, config.train.accumulate, config.optim.momentum)
    return config.method.faults(setup)


def _engine(config: Config) -> Faults:
    engine, train = config.engine, config.train
    deepspeed = engine.name == "deepspeed"
    zero3 = deepspeed and engine.zero_stage == 3
    refusal = zero3_refusal(config.method.name, config.method.needs())
    return [
        (zero3 and bool(refusal), refusal),
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
        zero3_fault(train.average, engine.name, engine.zero_stage),
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
            "@" in config.metrics.mlflow,  # likewise
            "metrics.mlflow: holds a password, which config.yaml would keep; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead",
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


def _classes(config: Config) -> Faults:
    return [
        (
            config.train.class_weights == "balanced" and bool(config.data.stream),
            "train.class_weights = balanced needs the number of images of each class, which data.stream does not say; "
            "give none, or train on data.path",
        )
    ]
