"""The plain scripts in launch/ start exactly what `esam-dist launch` composes."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest

from esam_dist import launch
from esam_dist.launch import arguments, compose, slurm
from tests.jobs import job

ROOT = Path(__file__).resolve().parents[2]
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
COMMON = {"RANKS_PER_NODE": "2", "HEAD": "head", "PORT": "1234", "LOGS": "logs"}


@pytest.mark.parametrize(
    ("script", "env", "options"),
    [
        ("torchrun/one_node.sh", {}, []),
        ("torchrun/several_nodes.sh", {"NODES": "3", "NODE_RANK": "1"}, ["--nnodes=3", "--node-rank=1"]),
        ("torchrun/elastic.sh", {"NODES": "1:4"}, ["--nnodes=1:4"]),
        ("deepspeed/one_node.sh", {}, ["--with=deepspeed"]),
        ("deepspeed/hostfile.sh", {}, ["--with=deepspeed", "--hostfile=HOSTS"]),
        (
            "deepspeed/no_ssh.sh",
            {"NODE_RANK": "1"},
            ["--with=deepspeed", "--hostfile=HOSTS", "--no-ssh", "--node-rank=1"],
        ),
    ],
)
def test_script_starts_what_launch_composes(script, env, options, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    options = [option.replace("HOSTS", str(hosts)) for option in options]
    local = script.endswith("one_node.sh")
    wanted = job(*options, *([] if local else ["--rendezvous=head:1234"]))
    if local and wanted.launcher == "deepspeed":
        env = env | {"PORT": str(wanted.port)}
    composed = compose.command(wanted, Path("logs"), {})
    stub = tmp_path / composed[2].partition(".")[0].replace("torch", "torchrun")
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv >"$0.env"\n')
    stub.chmod(0o755)
    variables = COMMON | {"HOSTFILE": str(hosts), "JOB": compose.meeting_name(wanted, {})} | env
    done = subprocess.run(
        [ROOT / "launch" / script, "run.yaml", "train.epochs=3"],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables,
    )
    words = done.stdout.splitlines()
    assert sorted(words) == sorted(composed[3:])
    assert words[-4:] == composed[-4:]
    seen = dict(line.split("=", 1) for line in Path(f"{stub}.env").read_text().splitlines() if "=" in line)
    if "--rdzv-backend=c10d" in words:
        assert seen.get(STORE) == compose.SETTINGS[STORE]


def test_sbatch_file_is_what_launch_renders():
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    options = ["--with=slurm", "--nnodes=4", "--nproc-per-node=8", "--sbatch=--gpus-per-node=8", "--sbatch=--exclusive"]
    args = parser.parse_args([*options, "configs/digits_esam.yaml"])
    script = slurm.render(arguments.job(args), Path("logs"), args.sbatch)
    assert (ROOT / "launch/slurm/esam.sbatch").read_text() == script
