"""What `esam-dist launch` looks at before it starts: each failure names key, value and remedy in one line."""

import contextlib
import socket

import pytest
import torch

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch import checks
from tests.jobs import job
from tests.launch.servers import free_ports


@contextlib.contextmanager
def taken(port=0, host="127.0.0.1"):
    """A port on which somebody listens, and never answers."""
    with socket.socket() as listener:
        listener.bind((host, port))
        listener.listen()
        yield listener.getsockname()[1]


def metrics(**values):
    return config.parse({"metrics": values}, "test")


@pytest.fixture
def gpus(monkeypatch):
    """A function that says how many GPUs this machine has."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_missing_data_names_key_and_remedy(tmp_path):
    cfg = config.parse({"data": {"path": str(tmp_path)}}, "test")
    with pytest.raises(UserError, match=r"data.path = .*no data there.*esam-dist prepare"):
        checks.check(job(), cfg)


def test_data_that_cannot_be_read_is_no_traceback(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(UserError, match=r"data.path = .*: cannot be read on this node \(Permission denied\)"):
        checks.check_data(config.parse({"data": {"path": str(tmp_path)}}, "test"))


def test_folder_of_logs_that_cannot_be_made_or_written_is_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--logs .*file/logs: cannot be written \(Not a directory\)"):
        checks.make_logs(tmp_path / "file/logs")
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--logs .*: cannot be written \(Permission denied\).*run.folder"):
        checks.make_logs(tmp_path)


def test_taken_metrics_port_is_found_before_the_start():
    first = free_ports(2)
    with taken(first + 1), pytest.raises(UserError, match=f"metrics.port = {first}: {first + 1} is taken"):
        checks.check_metrics_ports(job(), metrics(port=first))
    checks.check_metrics_ports(job(), metrics(port=first))


def test_metrics_port_of_the_last_rank_must_exist():
    with pytest.raises(UserError, match=r"metrics.port = 65535: the last of 2 ranks would listen at 65536"):
        checks.check_metrics_ports(job(), metrics(port=65535))


@pytest.mark.parametrize("bind", ["192.0.2.1", "no.such.host.invalid"])
def test_address_that_is_not_this_nodes_is_not_called_taken(bind):
    with pytest.raises(UserError, match=f"metrics.bind = {bind}: no rank can listen there") as error:
        checks.check_metrics_ports(job(), metrics(port=free_ports(2), bind=bind))
    assert "taken" not in str(error.value)


def test_taken_rendezvous_port_is_found_on_node_zero_only(tmp_path):
    (tmp_path / "shard").touch()
    cfg = config.parse({"data": {"path": str(tmp_path)}}, "test")
    with taken() as port:
        options = ["--nnodes=2", f"--rendezvous=head:{port}"]
        with pytest.raises(UserError, match=f"--rendezvous head:{port}: cannot be opened here"):
            checks.check(job(*options, "--node-rank=0"), cfg)
        checks.check(job(*options, "--node-rank=1"), cfg)


def test_head_is_the_machine_whose_address_it_is(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    over_ssh = ["--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}"]
    for options in (["--nnodes=1:2"], ["--nnodes=2", "--max-restarts=1"], over_ssh):
        assert checks.is_head(job(*options, "--rendezvous=localhost"))
        assert not checks.is_head(job(*options, "--rendezvous=192.0.2.1"))
        assert not checks.is_head(job(*options, "--rendezvous=no.such.host.invalid"))
    assert checks.is_head(job("--with=deepspeed"))
    assert not checks.is_head(job()), "alone, torchrun chooses a free port"


def test_taken_port_is_found_on_the_head_of_an_elastic_job_and_of_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ANSWER_SECONDS", 0.5)
    (tmp_path / "shard").touch()
    cfg = config.parse({"data": {"path": str(tmp_path)}}, "test")
    with taken() as port:
        for options in (["--nnodes=1:2"], ["--with=deepspeed"]):
            with pytest.raises(UserError, match=rf"127.0.0.1:{port}: cannot be opened here.*choose another"):
                checks.check(job(*options, f"--rendezvous=127.0.0.1:{port}"), cfg)


def test_second_agent_of_a_machine_joins_the_rendezvous_of_the_first():
    port = free_ports(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    checks.check_rendezvous_port(job("--nnodes=1:2", f"--rendezvous=127.0.0.1:{port}"))
    del store


def test_more_ranks_than_gpus_are_refused_under_both_launchers(gpus, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\n")
    by_hand = [f"--hostfile={tmp_path / 'hosts'}", "--no-ssh", "--node-rank=0", "--rendezvous=a", "--with=deepspeed"]
    gpus(1)
    for options, given in (
        ([], "--nproc-per-node 2"),
        (["--with=deepspeed"], "--nproc-per-node 2"),
        (by_hand, "slots=2"),
    ):
        with pytest.raises(UserError, match=f"{given}: this node has 1 GPUs; give 1 or fewer"):
            checks.check_gpus(job(*options))
    gpus(2)
    checks.check_gpus(job())
    gpus(0)
    checks.check_gpus(job())


def test_gpus_that_the_environment_names_must_be_there(gpus, monkeypatch):
    gpus(0)
    for named in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        checks.check_gpus(job())
    for named in ("0,1", "GPU-8932f937", "MIG-41f9a0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES = {named}: torch .* finds no GPU"):
            checks.check_gpus(job())


def test_gpus_are_not_looked_for_where_ssh_starts_the_ranks_elsewhere(gpus, tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shard").touch()
    gpus(1)
    cfg = config.parse({"data": {"path": str(tmp_path / "data")}}, "test")
    checks.check(job("--with=deepspeed", f"--hostfile={tmp_path / 'hosts'}", "--rendezvous=192.0.2.1"), cfg)
