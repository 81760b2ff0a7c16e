"""Options, commands, checks and scripts of `esam-dist launch`, without starting a job."""

import argparse
import io
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed import run as torchrun

from esam_dist import config, launch
from esam_dist.errors import UserError
from esam_dist.launch import arguments, checks, compose, follow, meet, slurm
from tests.jobs import job, parsed
from tests.launch.servers import free_ports

FACTS = {"torch": "2.15", "config": "train:\n  epochs: 3\n"}


def command(*words):
    composed = compose.command(job(*words), Path("logs"), FACTS)
    assert composed[-4:] == ["esam_dist", "train", "run.yaml", "train.epochs=3"]
    return composed[1:-5]


def test_one_node_stands_alone():
    words = [
        "--nproc-per-node=2",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "--log-dir=logs",
        "--tee=3",
    ]
    assert command() == ["-m", "torch.distributed.run", *words]


def test_numbered_nodes_meet_at_node_zero():
    words = command("--nnodes=3", "--node-rank=1", "--rendezvous=head:1234")
    assert {"--nnodes=3", "--node-rank=1", "--master-addr=head", "--master-port=1234"} <= set(words)
    assert "--rdzv-backend=c10d" not in words


def test_nodes_that_come_and_go_meet_by_c10d_and_may_restart():
    words = command("--nnodes=1:4", "--rendezvous=head", "--local-addr=10.0.0.2")
    assert {"--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=head:29500", "--max-restarts=3"} <= set(words)
    assert "--local-addr=10.0.0.2" in words


def test_torchrun_reads_the_elastic_form_as_it_is_meant():
    words = command("--nnodes=1:4", "--rendezvous=head:1234", "--name=digits")
    read, program, _ = torchrun.config_from_args(torchrun.parse_args([*words[2:], "-m", "esam_dist"]))
    assert (read.min_nodes, read.max_nodes, read.nproc_per_node, read.max_restarts) == (1, 4, 2, 3)
    assert (read.rdzv_backend, read.rdzv_endpoint) == ("c10d", "head:1234")
    assert read.run_id.startswith("digits-")
    assert program == sys.executable


def test_numbered_nodes_that_may_restart_meet_by_c10d():
    words = command("--nnodes=2", "--node-rank=0", "--rendezvous=head", "--max-restarts=2")
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-conf=is_host=True"} <= set(words)


def test_nodes_of_another_version_or_config_do_not_share_a_rendezvous():
    one, same = (compose.meeting_name(job(), dict(FACTS)) for _ in range(2))
    assert one == same
    assert one != compose.meeting_name(job(), FACTS | {"torch": "2.14"})


def test_deepspeed_on_this_machine():
    words = command("--with=deepspeed")
    assert words[:3] == ["-m", "deepspeed.launcher.runner", "--no_local_rank"]
    assert {"--num_gpus=2", "--enable_each_rank_log=logs"} <= set(words)


def test_deepspeed_without_ssh_takes_its_size_from_the_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.1 slots=1\n# spare\n10.0.0.2 slots=1\n")
    options = [f"--hostfile={hosts}", "--no-ssh", "--node-rank=1", "--rendezvous=10.0.0.1:4000"]
    words = command("--with=deepspeed", *options)
    assert {"--no_ssh", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=4000"} <= set(words)
    assert job("--with=deepspeed", *options).max_nodes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes=2"], "--nnodes 2: the nodes must meet; give --rendezvous"),
        (["--nnodes=4:1"], "--nnodes 4:1: give a number of nodes"),
        (["--nnodes=two"], "--nnodes two: give a number of nodes"),
        (["--nnodes=2", "--rendezvous=head:port"], "--rendezvous head:port: give HOST or HOST:PORT"),
        (["--nnodes=2", "--rendezvous=:29500"], "--rendezvous :29500: give HOST or HOST:PORT"),
        (["--nnodes=2", "--rendezvous=h", "--node-rank=2"], "--node-rank 2: must lie between 0 and 1"),
        (["--with=deepspeed", "--nnodes=1:2", "--rendezvous=h"], "deepspeed takes a fixed number"),
        (
            ["--with=deepspeed", "--nnodes=3", "--rendezvous=h"],
            "--nnodes 3: deepspeed takes a fixed number of nodes from",
        ),
        (["--with=deepspeed", "--no-ssh"], "--no-ssh: also give --hostfile"),
        (["--hostfile=hosts"], "--hostfile: has no effect on torchrun; leave it out, or use --with deepspeed"),
        (["--with=deepspeed", "--max-restarts=2"], "--max-restarts: has no effect on deepspeed"),
        (["--with=slurm", "--rendezvous=h"], "--rendezvous: has no effect on slurm"),
        (["--with=kubernetes", "--name=mine"], "--name: has no effect on kubernetes"),
        (["--with=kubernetes", "--logs=mine"], "--logs: has no effect on kubernetes"),
        (["--max-restarts=-1"], "--max-restarts -1: give 0 or more"),
        (["--grace=-5"], "--grace -5: give 0 or more"),
        (["--with=deepspeed", "--hostfile=/none"], "--hostfile /none: cannot be read"),
        (["--nproc-per-node=-1"], "--nproc-per-node -1"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(UserError) as error:
        arguments.job(parsed(*options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


BAD_HOSTFILES = ["", "a\n", "a slots\n", "a slots=1 extra\n", "a slots=x\n", "a slots=0\n", "a slots=1\nb slots = 1\n"]


@pytest.mark.parametrize("text", BAD_HOSTFILES)
def test_hostfile_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="HOST slots=N"):
        job("--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}")


def test_host_that_stands_twice_in_a_hostfile_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\na slots=2\n")
    with pytest.raises(UserError, match="a stands there twice"):
        job("--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}")


@pytest.mark.parametrize("option", ["--nnodes=2", "--nproc-per-node=0"])
def test_sizes_beside_a_hostfile_are_refused(tmp_path, option):
    (tmp_path / "hosts").write_text("a slots=2\n")
    with pytest.raises(UserError, match=f"{option.split('=')[0]}: --hostfile says how many; leave one of them out"):
        job("--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}", option)


def test_ranks_of_a_node_are_its_slots_in_the_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb   slots=4 # the large one\n")
    options = ["--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}", "--no-ssh", "--rendezvous=a"]
    assert [job(*options, f"--node-rank={rank}").ranks_per_node for rank in range(2)] == [1, 4]


def test_versions_do_not_depend_on_the_nodes_own_paths(tmp_path):
    here, there = (config.parse({"data": {"path": p}, "run": {"folder": p}}, "") for p in ("/a", "/b"))
    assert checks.versions(here) == checks.versions(there)
    assert checks.versions(here) != checks.versions(config.parse({"train": {"epochs": 7}}, ""))


def meet_all(facts_of):
    port = free_ports(1)
    errors = {}

    def node(rank, facts):
        try:
            meet.compare(job("--nnodes=3", f"--rendezvous=127.0.0.1:{port}", f"--node-rank={rank}"), facts, 20)
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=node, args=entry) for entry in facts_of.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


def test_nodes_alike_meet_without_a_word():
    assert meet_all(dict.fromkeys(range(3), FACTS)) == {}


def test_every_node_says_which_node_differs_and_how():
    other = {"torch": "2.15", "config": "train:\n  epochs: 4\n"}
    errors = meet_all({0: FACTS, 1: FACTS, 2: other})
    assert set(errors) == {0, 1, 2}
    assert set(errors.values()) == {
        "node 2 has another config than node 0 (epochs: 3; epochs: 4); give all nodes the same"
    }
    errors = meet_all({0: FACTS, 1: FACTS | {"torch": "2.14"}, 2: FACTS})
    assert errors[0] == "node 1 runs torch 2.14, node 0 runs 2.15; install the same on all nodes"


def test_no_node_goes_on_while_the_store_of_the_comparison_is_open(monkeypatch):
    leave, answered = meet._leave, {}

    def leave_late(store, me, nodes):
        time.sleep(1.5 * (me == 2))
        leave(store, me, nodes)

    def compare(wanted, *rest):
        meet_as_before(wanted, *rest)
        # torchrun would now look for its own store at this port
        with socket.socket() as torchrun:
            answered[wanted.node_rank] = torchrun.connect_ex((wanted.host, wanted.port)) == 0

    meet_as_before = meet.compare
    monkeypatch.setattr(meet, "_leave", leave_late)
    monkeypatch.setattr(meet, "compare", compare)
    assert meet_all(dict.fromkeys(range(3), FACTS)) == {}
    assert answered == dict.fromkeys(range(3), False)


def test_nodes_that_do_not_come_are_an_error_with_a_remedy():
    with pytest.raises(UserError, match="the 2 nodes did not meet within 1 s"):
        meet.compare(job("--nnodes=2", f"--rendezvous=127.0.0.1:{free_ports(1)}", "--node-rank=1"), FACTS, 1)


def test_follow_prefixes_lines_with_the_rank_and_leaves_old_logs_alone(tmp_path):
    (tmp_path / "old_rank0.log").write_text("yesterday\n")
    out, over = io.StringIO(), threading.Event()
    thread = threading.Thread(target=follow.follow, args=(tmp_path, follow.sizes(tmp_path), over, out, 0.01))
    thread.start()
    with (tmp_path / "new_rank1.log").open("w") as file:
        for part in ("first\nsec", "ond\nlast without end"):
            file.write(part)
            file.flush()
    over.set()
    thread.join(10)
    assert out.getvalue().splitlines() == ["[rank 1] first", "[rank 1] second", "[rank 1] last without end"]


def test_slurm_script_is_bash_and_holds_the_job(tmp_path):
    wanted = job("--with=slurm", "--nnodes=3", "--grace=120")
    script = slurm.render(wanted, Path("runs/a/logs"), ["--partition=gpu"])
    assert "#SBATCH --nodes=3\n" in script
    assert "#SBATCH --signal=TERM@120\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert '"run.yaml" "train.epochs=3"' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_nodes_count_their_own_gpus_where_no_number_is_given():
    for option, words in (("", []), ("--nproc-per-node=8 ", ["--nproc-per-node=8"])):
        wanted = arguments.job(parsed("--with=slurm", "--nnodes=2", *words))
        script = slurm.render(wanted, Path("my runs/logs"), [])
        assert f'--node-rank="$SLURM_NODEID" {option}\\\n' in script
        assert '--logs="my runs/logs" ' in script
        assert "#SBATCH --output=%x-%j.log\n" in script, "Slurm makes no folder for it"


def test_slurm_restarts_ranks_as_often_as_is_said():
    script = slurm.render(job("--with=slurm", "--nnodes=2", "--max-restarts=5"), Path("logs"), [])
    assert '--node-rank="$SLURM_NODEID" --nproc-per-node=2 --max-restarts=5 \\\n' in script
    assert "--max-restarts" not in slurm.render(job("--with=slurm", "--nnodes=2"), Path("logs"), [])


def test_slurm_refuses_what_a_shell_would_change():
    with pytest.raises(UserError, match="cannot stand in a Slurm script"):
        slurm.render(job("--with=slurm"), Path("$HOME/logs"), [])
    with pytest.raises(UserError, match="--name 'a b': Slurm takes a name without blanks"):
        slurm.render(job("--with=slurm", "--name=a b"), Path("logs"), [])
    with pytest.raises(UserError, match="Slurm allocates a fixed number"):
        slurm.render(job("--with=slurm", "--nnodes=1:4"), Path("logs"), [])


def dry_run(tmp_path, capsys, *options):
    path = tmp_path / "a config.yaml"
    path.write_text(yaml.safe_dump({"train": {"epochs": 1}}))
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    assert launch.run(parser.parse_args(["--dry-run", "--nproc-per-node=2", *options, str(path)])) == 0
    return capsys.readouterr().out


def test_dry_run_prints_a_command_that_a_shell_reads_back(tmp_path, capsys):
    printed = dry_run(tmp_path, capsys)
    words = shlex.split(printed, comments=True)
    assert words[-3:] == ["esam_dist", "train", str(tmp_path / "a config.yaml")]
    assert printed.splitlines()[:-1] == ["# launch also checks data, ports and GPUs of this node first"]


def test_dry_run_of_an_elastic_job_has_its_environment_and_says_what_launch_does_besides(tmp_path, capsys):
    printed = dry_run(tmp_path, capsys, "--nnodes=1:4", "--rendezvous=head", "--grace=77")
    words = shlex.split(printed, comments=True)
    settings = dict(word.split("=", 1) for word in words[1 : words.index(sys.executable)])
    assert words[0] == "env"
    assert settings.items() >= compose.SETTINGS.items()
    assert settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "77"
    assert "# launch also gives up a rendezvous that does not answer for a minute\n" in printed
    assert "# launch also does not restart ranks that end with status 2\n" in printed


def test_dry_run_of_deepspeed_needs_no_environment(tmp_path, capsys):
    printed = dry_run(tmp_path, capsys, "--with=deepspeed")
    assert shlex.split(printed, comments=True)[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
