"""`esam-dist launch` on this machine: real ranks under torchrun and deepspeed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from servers import ROOT, free_ports, started, until


def command(digits, *words):
    return [
        sys.executable,
        "-m",
        "esam_dist",
        "launch",
        "--nproc-per-node=2",
        *words[:-1],
        str(digits / "config.yaml"),
        *words[-1],
    ]


def test_status_of_a_failing_rank_is_the_status_of_the_launch(digits, tmp_path):
    overrides = [f"data.path={tmp_path / 'nowhere'}", f"run.folder={tmp_path / 'run'}"]
    words = command(digits, "--no-checks", "--max-restarts=2", f"--logs={tmp_path / 'logs'}", overrides)
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "[rank 0] esam-dist: error:" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    logs = {path.parts[-3:-1]: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    assert set(logs) == {("attempt_0", "0"), ("attempt_0", "1")}, "no restart mends the user's mistake"
    assert "nowhere" in logs["attempt_0", "0"]


@pytest.mark.slow
def test_rank_with_loader_processes_stops_with_a_checkpoint(digits, tmp_path):
    overrides = [f"run.folder={tmp_path / 'run'}", "data.workers=2", "train.max_steps=100000"]
    words = command(digits, f"--logs={tmp_path / 'logs'}", overrides)
    shown = tmp_path / "shown.log"
    with started(words, shown, cwd=ROOT) as running:
        until(lambda: " step 6/" in shown.read_text(), 200, "six updates are shown")
        running.terminate()
        assert running.wait(120) == 143, shown.read_text()[-3000:]
    assert "Warning" not in shown.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / f"run/checkpoints/step_{max(row['step'] for row in rows):08d}").is_dir(), shown.read_text()[
        -3000:
    ]


def deepspeed_command(digits, tmp_path):
    overrides = [f"run.folder={tmp_path / 'run'}", "engine.name=deepspeed", "train.max_steps=100000"]
    options = ["--with=deepspeed", f"--rendezvous=127.0.0.1:{free_ports(1)}", f"--logs={tmp_path / 'logs'}"]
    return command(digits, *options, overrides)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_job_shows_its_ranks_and_stops_with_a_checkpoint(digits, tmp_path):
    shown = tmp_path / "shown.log"
    with started(deepspeed_command(digits, tmp_path), shown, cwd=ROOT) as running:
        until(lambda: "[rank 0]" in shown.read_text() and " step 6/" in shown.read_text(), 600, "six updates are shown")
        running.terminate()
        assert running.wait(120) == 143, shown.read_text()[-3000:]
    assert len(list((tmp_path / "logs").glob("*_rank[01].log"))) == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows if row["kind"] == "train")
    assert (tmp_path / f"run/checkpoints/step_{last:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_rank_that_is_killed_tells_its_signal(digits, tmp_path):
    shown = tmp_path / "shown.log"
    with started(deepspeed_command(digits, tmp_path), shown, cwd=ROOT) as running:
        until(lambda: " step 6/" in shown.read_text(), 600, "six updates are shown")
        ranks = [child for child in psutil.Process(running.pid).children(recursive=True) if "RANK" in child.environ()]
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        assert running.wait(120) == 128 + 9, shown.read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["torchrun", "deepspeed"])
def test_script_for_one_node_trains(script, digits, tmp_path):
    words = [str(ROOT / f"launch/{script}/one_node.sh"), str(digits / "config.yaml"), f"run.folder={tmp_path / 'run'}"]
    engine = "deepspeed" if script == "deepspeed" else "native"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"RANKS_PER_NODE": "2", "PORT": str(free_ports(1)), "LOGS": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"}
    with started(
        [*words, f"engine.name={engine}", "train.max_steps=6"], tmp_path / "log", env=os.environ | env
    ) as running:
        assert running.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["samples"] for row in rows if row["kind"] == "train") == 6 * 16 * 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_deepspeed_trains_in_a_process_that_no_launcher_started(digits, tmp_path, stage):
    method = "method.name=sam" if stage == 3 else "method.name=esam"
    overrides = [f"run.folder={tmp_path / 'run'}", "engine.name=deepspeed", f"engine.zero_stage={stage}", method]
    words = [sys.executable, "-m", "esam_dist", "train", str(digits / "config.yaml"), *overrides, "train.max_steps=4"]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    # the variable of a Service of the name `master`, in any pod of its namespace
    env |= {"MASTER_PORT": "tcp://10.0.0.1:80"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["samples"] for row in rows if row["kind"] == "train") == 4 * 16
    assert (tmp_path / "run/checkpoints/step_00000004").is_dir()


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("nodes", ["2", "2:3"], ids=["numbered", "elastic"])
def test_two_nodes_meet_at_an_ipv6_address(digits, tmp_path, nodes):
    meeting = f"--rendezvous=[::1]:{free_ports(1)}"
    overrides = [f"run.folder={tmp_path / 'run'}", "train.max_steps=4"]
    with contextlib.ExitStack() as stack:
        running = []
        for node in range(2):
            options = [f"--nnodes={nodes}", f"--node-rank={node}", meeting, "--local-addr=::1"]
            words = [*command(digits, *options, overrides), f"--logs={tmp_path / str(node)}", "--nproc-per-node=1"]
            running.append(stack.enter_context(started(words, tmp_path / f"log{node}", cwd=ROOT)))
        statuses = [node.wait(250) for node in running]
    assert statuses == [0, 0], "".join((tmp_path / f"log{node}").read_text() for node in range(2))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["samples"] for row in rows if row["kind"] == "train") == 4 * 16 * 2
