"""The numbers of a rendered Kubernetes job: each put everywhere that it stands, so that they agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from esam_dist.errors import UserError

Resource = dict[str, Any]
# Where the kinds that run pods hold the specification of their Job.
JOBS = {
    "Job": ("spec",),
    "JobSet": ("spec", "replicatedJobs", 0, "template", "spec"),
    "TrainingRuntime": ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec"),
}
METRICS_PORT = 9400
# What the manifests leave between the launch's own patience and the kubelet's, in seconds.
SPARE_SECONDS = 30


@dataclass(frozen=True)
class Sizes:
    """What the user gave; None: as the overlay says."""

    nodes: int | None
    ranks_per_node: int | None
    max_restarts: int | None
    grace_seconds: int | None


def resize(resources: list[Resource], sizes: Sizes) -> None:
    """Change the overlay's `resources` to `sizes`, in place.

    The resources of a pod (GPUs, CPUs, memory) are in proportion to its ranks, and it declares a port for each.
    Raises UserError for an overlay without the base's settings.
    """
    maps = (resource["data"] for resource in resources if resource["kind"] == "ConfigMap")
    settings = next((data for data in maps if "RANKS_PER_NODE" in data), None)
    if settings is None:
        raise UserError("--overlay: has no ConfigMap with RANKS_PER_NODE; build it on launch/kubernetes/base")
    before = int(settings["RANKS_PER_NODE"])
    given = {"NODES": sizes.nodes, "RANKS_PER_NODE": sizes.ranks_per_node, "MAX_RESTARTS": sizes.max_restarts}
    settings |= {name: str(value) for name, value in given.items() if value is not None}
    for resource in resources:
        if resource["kind"] == "TrainJob":
            numbers = {"numNodes": sizes.nodes, "numProcPerNode": sizes.ranks_per_node}
            resource["spec"]["trainer"] |= {name: value for name, value in numbers.items() if value is not None}
        if resource["kind"] == "NetworkPolicy" and sizes.ranks_per_node:
            _open_ports(resource["spec"], sizes.ranks_per_node)
    for job in _jobs(resources):
        if sizes.nodes and "completions" in job:
            job["parallelism"] = job["completions"] = sizes.nodes
        pod = job["template"]["spec"]
        if sizes.ranks_per_node:
            _fill(pod, sizes.ranks_per_node, before)
        if sizes.grace_seconds is not None:
            pod["terminationGracePeriodSeconds"] = sizes.grace_seconds + SPARE_SECONDS
            args = _node(pod)["args"]
            args[:] = [f"--grace={sizes.grace_seconds}" if word.startswith("--grace=") else word for word in args]


def _jobs(resources: list[Resource]) -> Iterator[Resource]:
    for resource in resources:
        found: Any = resource
        for key in JOBS.get(resource["kind"], ()):
            found = found[key]
        if found is not resource and _node(found["template"]["spec"]):
            yield found


def _node(pod: Resource) -> Resource:
    return next((container for container in pod["containers"] if container["name"] == "node"), {})


def _fill(pod: Resource, ranks: int, before: int) -> None:
    container = _node(pod)
    for amounts in container["resources"].values():
        amounts |= {name: _scaled(str(amount), ranks, before) for name, amount in amounts.items()}
    for volume in pod["volumes"]:
        if volume["name"] == "shared-memory":
            volume["emptyDir"]["sizeLimit"] = _scaled(str(volume["emptyDir"]["sizeLimit"]), ranks, before)
    container["ports"] = [
        *(port for port in container["ports"] if not port["name"].startswith("metrics-")),
        *({"name": f"metrics-{rank}", "containerPort": METRICS_PORT + rank} for rank in range(ranks)),
    ]


def _open_ports(policy: Resource, ranks: int) -> None:
    for rule in policy["ingress"]:
        for ports in rule.get("ports", []):
            if ports["port"] == METRICS_PORT:
                ports["endPort"] = METRICS_PORT + ranks - 1


def _scaled(quantity: str, ranks: int, before: int) -> str:
    """`quantity`, such as 16Gi or 500m, of `before` ranks, for `ranks`. Raises UserError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(\w*)", quantity)
    if found is None:
        raise UserError(f"--overlay: {quantity!r} is no quantity that goes with the ranks; write it as 16Gi or 500m")
    number, suffix = found.groups()
    return f"{(Decimal(number) * ranks / before).normalize():f}{suffix}"
