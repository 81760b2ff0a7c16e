"""The keys of `metrics`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esam_dist.section import NonNegative, Section


class MetricsKeys(Section):
    """Who may watch."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus endpoint of local rank 0; local rank r listens at port + r; 0: off."""
    bind: str = "127.0.0.1"
    """Address the endpoint listens on."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases (extra `wandb`): `offline` writes RUN/wandb, for `wandb sync`; `online` sends at once."""
    mlflow: str = ""
    """MLflow (extra `mlflow`): the tracking URI, such as `file:mlruns` or `http://host:5000`; empty: off."""
    project: str = "esam-dist"
    """Project of Weights & Biases, experiment of MLflow."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Progress on rank 0: a bar on a terminal, log lines elsewhere."""
    stall_seconds: NonNegative = 600.0
    """`/healthz` turns unhealthy when nothing moved for this long; longer than a checkpoint; 0: never."""
    gateway: str | None = None
    """Pushgateway (`http://host:9091`) that takes the final values of a job too short to be scraped."""
