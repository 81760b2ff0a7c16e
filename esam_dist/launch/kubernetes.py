"""The manifests of one job: the overlay of launch/kubernetes with this job's name, size, image and configuration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "kubernetes"


def render(job: Job, cfg: config.Config, overlay: str, image: str | None, namespace: str | None) -> str:
    """The YAML that `kubectl apply -f -` takes. Raises UserError where the overlay or kubectl is missing."""
    source = _find(overlay)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UserError("--with kubernetes: kubectl is not on the PATH; install it (no cluster is needed to render)")
    if job.elastic:
        raise UserError(f"--nnodes {job.min_nodes}:{job.max_nodes}: a Kubernetes job has a fixed size; give one number")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(config.dump(cfg))
        text = yaml.safe_dump(kustomization(job, os.path.relpath(source, folder), image, namespace), sort_keys=False)
        (Path(folder) / "kustomization.yaml").write_text(text)
        done = subprocess.run([kubectl, "kustomize", folder], check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--overlay {overlay}: kubectl cannot render it ({' '.join(done.stderr.split())})")
    return done.stdout


def kustomization(job: Job, source: str, image: str | None, namespace: str | None) -> dict[str, Any]:
    """What has to change in the overlay at `source`: everything else stays as it is written there."""
    settings = [f"NODES={job.max_nodes}", f"RANKS_PER_NODE={job.ranks_per_node}"]
    values: dict[str, Any] = {
        "resources": [source],
        "configMapGenerator": [
            {"name": "esam-config", "behavior": "merge", "files": ["config.yaml"]},
            {"name": "esam-settings", "behavior": "merge", "literals": settings},
        ],
        "generatorOptions": {"disableNameSuffixHash": True},
        "patches": [_sized(kind, paths, job) for kind, paths in SIZES.items()],
    }
    if image:
        path, slash, last = image.rpartition("/")  # a colon before the last slash is a port
        name, _, tag = last.partition(":")
        values["images"] = [{"name": "esam-dist", "newName": path + slash + name} | ({"newTag": tag} if tag else {})]
    if namespace:
        values["namespace"] = namespace
    return values


SIZES = {
    "Job": ("/spec/parallelism", "/spec/completions"),
    "JobSet": tuple(f"/spec/replicatedJobs/0/template/spec/{key}" for key in ("parallelism", "completions")),
    "TrainJob": ("/spec/trainer/numNodes",),
}


def _sized(kind: str, paths: tuple[str, ...], job: Job) -> dict[str, Any]:
    changes = [{"op": "replace", "path": path, "value": job.max_nodes} for path in paths]
    if kind == "TrainJob":
        changes += [{"op": "replace", "path": "/spec/trainer/numProcPerNode", "value": job.ranks_per_node}]
    return {"target": {"kind": kind}, "patch": json.dumps(changes)}


def _find(overlay: str) -> Path:
    for folder in (FOLDER / "overlays" / overlay, FOLDER / overlay, Path(overlay)):
        if (folder / "kustomization.yaml").is_file():
            return folder.resolve()
    if not FOLDER.is_dir():
        raise UserError(f"--overlay {overlay}: not a folder with a kustomization.yaml, and {FOLDER} is not there")
    known = sorted(path.name for path in (FOLDER / "overlays").iterdir())
    raise UserError(f"--overlay {overlay}: is none of {', '.join(known)}, and no folder with a kustomization.yaml")
