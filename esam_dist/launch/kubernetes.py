"""The manifests of one job: the overlay of launch/kubernetes with this job's name, size, image and configuration."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch.arguments import Job
from esam_dist.launch.sizes import Sizes, resize


def manifests() -> Path:
    """The folder of manifests: in a wheel it lies within this package, in a source tree it is launch/kubernetes."""
    package = Path(str(resources.files("esam_dist.launch")))
    installed = package / "files"
    return (installed if installed.is_dir() else package.parents[1] / "launch") / "kubernetes"


def render(args: argparse.Namespace, job: Job, cfg: config.Config) -> str:
    """The YAML that `kubectl apply -f -` takes. Raises UserError where the overlay or kubectl is missing."""
    overlay = args.overlay or "base"
    source = _find(overlay)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UserError("--with kubernetes: kubectl is not on the PATH; install it (no cluster is needed to render)")
    if job.elastic:
        raise UserError(f"--nnodes {args.nnodes}: a Kubernetes job has a fixed size; give one number")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(config.dump(cfg))
        values = kustomization(os.path.relpath(source, folder), args.image, args.namespace)
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        done = subprocess.run([kubectl, "kustomize", folder], check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--overlay {overlay}: kubectl cannot render it ({' '.join(done.stderr.split())})")
    resources = list(yaml.safe_load_all(done.stdout))
    nodes = None if args.nnodes is None else job.max_nodes
    resize(resources, Sizes(nodes, job.ranks_per_node or None, args.max_restarts, args.grace))
    return yaml.dump_all(resources, Dumper=_Blocks, sort_keys=False)


def kustomization(source: str, image: str | None, namespace: str | None) -> dict[str, Any]:
    """The overlay at `source` with this job's configuration, image and namespace."""
    values: dict[str, Any] = {
        "resources": [source],
        "configMapGenerator": [{"name": "esam-config", "behavior": "merge", "files": ["config.yaml"]}],
        "generatorOptions": {"disableNameSuffixHash": True},
    }
    if image:
        path, slash, last = image.rpartition("/")  # a colon before the last slash is a port
        name, _, tag = last.partition(":")
        values["images"] = [{"name": "esam-dist", "newName": path + slash + name} | ({"newTag": tag} if tag else {})]
    if namespace:
        values["namespace"] = namespace
    return values


class _Blocks(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


_Blocks.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def _find(overlay: str) -> Path:
    ours = manifests()
    for folder in (ours / "overlays" / overlay, ours / overlay, Path(overlay)):
        if (folder / "kustomization.yaml").is_file():
            return folder.resolve()
    if not ours.is_dir():
        raise UserError(f"--overlay {overlay}: not a folder with a kustomization.yaml, and {ours} is not there")
    known = sorted(path.name for path in (ours / "overlays").iterdir())
    raise UserError(f"--overlay {overlay}: is none of {', '.join(known)}, and no folder with a kustomization.yaml")
