"""Every check of `doctor` meets what it is there to find."""

import errno
import socket
import time
from collections import namedtuple
from contextlib import closing

import pytest

from esam_dist import config
from esam_dist.config import Config
from esam_dist.doctor import machine, meeting, software
from esam_dist.doctor.row import bounded, ok
from tests.commands import here

Usage = namedtuple("Usage", "total used free")


def configured(**sections):
    return config.parse(sections, "f.yaml")


def the(rows, check):
    (row,) = [row for row in rows if row.check == check]
    assert (row.state == "ok") == (not row.remedy)
    return row


def test_versions_that_are_too_old_or_missing(monkeypatch):
    rows = software.versions(Config(), ["torch>=99", "torchvision>=0.1"])
    assert the(rows, "torch").state == "fail"
    assert "torch>=99" in the(rows, "torch").remedy
    assert the(rows, "torchvision").state == "ok"
    monkeypatch.setattr(software, "_version", lambda name: None)
    assert the(software.versions(Config()), "deepspeed").state == "warn"
    assert the(software.versions(configured(engine={"name": "deepspeed"})), "deepspeed").state == "fail"


def test_a_driver_without_a_gpu_for_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(software.torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(software, "DRIVER", tmp_path / "version")
    assert the(software.devices(), "devices").state == "ok"
    (tmp_path / "version").write_text("NVRM")
    assert the(software.devices(), "devices").state == "fail"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert the(software.devices(), "devices").state == "warn"


def test_a_gpu_that_this_build_cannot_use(monkeypatch):
    def refuse(*_args, **_options):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    properties = namedtuple("Properties", "name total_memory")("H100", 80 * 2**30)
    monkeypatch.setattr(software.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(software.torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(software.torch, "ones", refuse)
    row = the(software.devices(), "GPU 0")
    assert row.state == "fail"
    assert "no kernel image" in row.found


def test_gpus_without_nccl(monkeypatch):
    monkeypatch.setattr(software.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(software.torch.distributed, "is_nccl_available", lambda: False)
    assert the(software.nccl(), "NCCL").state == "fail"


@pytest.mark.parametrize(("free", "state"), [(1, "fail"), (150, "warn"), (10_000, "ok")])
def test_shared_memory_that_loaders_do_not_fit_into(monkeypatch, free, state):
    cfg = configured(data={"batch_size": 64, "image_size": 224, "workers": 2})  # 2 loaders of 6 batches: 110 MiB
    monkeypatch.setattr(machine, "ranks", lambda: 1)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(64 * 2**30, 0, free * 2**20))
    assert the(machine.shared_memory(cfg), "shared memory").state == state


def test_shared_memory_that_is_not_there(tmp_path):
    assert the(machine.shared_memory(Config(), tmp_path / "shm"), "shared memory").state == "fail"


@pytest.mark.parametrize(("free", "state"), [(0, "fail"), (900 * 2**20, "warn"), (2**40, "ok")])
def test_a_full_disk(monkeypatch, tmp_path, free, state):
    cfg = configured(run={"folder": str(tmp_path / "new" / "run")}, model={"name": "resnet18"})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(2**41, 0, free))
    assert the(machine.disk(cfg), "disk").state == state


def test_a_disk_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert the(machine.disk(configured(run={"folder": str(tmp_path)})), "disk").state == "fail"


def test_ports_that_are_taken():
    with closing(socket.socket()) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rows = machine.ports(configured(metrics={"port": port, "bind": "0.0.0.0"}), rendezvous=port)
    assert the(rows, "metrics port").state == "fail"
    assert the(rows, "rendezvous port").state == "warn"


def test_a_port_that_only_the_examples_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "refusal", lambda host, port: OSError(errno.EADDRINUSE, "in use"))
    assert the(machine.ports(Config()), "metrics port").state == "warn"


def test_data_that_is_not_there(tmp_path):
    row = the(machine.data(configured(data={"path": str(tmp_path / "nowhere")})), "data")
    assert row.state == "fail"
    assert "esam-dist prepare" in row.remedy


def test_slow_decoding(monkeypatch):
    assert "images a second and core" in the(machine.decoding(0.05), "decoding").found
    monkeypatch.setattr(machine, "SLOW", 1e9)
    assert the(machine.decoding(0.05), "decoding").state == "warn"


def test_ranks_that_do_not_meet(monkeypatch):
    monkeypatch.setattr(meeting, "PROGRAM", "import time; time.sleep(60)")
    begin = time.monotonic()
    row = the(meeting.all_reduce("gloo", 2, seconds=1), "all-reduce, gloo")
    assert row.state == "fail"
    assert time.monotonic() - begin < 20
    monkeypatch.setattr(meeting, "PROGRAM", "raise RuntimeError('no such interface')")
    assert "no such interface" in the(meeting.all_reduce("gloo", 2), "all-reduce, gloo").found


@pytest.mark.slow
def test_ranks_that_meet():
    assert the(meeting.all_reduce("gloo", 2), "all-reduce, gloo").state == "ok"


def test_a_check_that_hangs_or_raises_is_a_row():
    assert bounded("disk", lambda: time.sleep(5) or [], 0.1)[0].state == "fail"
    (row,) = bounded("disk", lambda: 1 / 0, 5)
    assert (row.check, row.state) == ("disk", "fail")
    assert "division" in row.found


def test_doctor_prints_one_table_and_exits_1_where_something_fails(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "all_reduce", lambda backend, ranks: [ok(backend, "met")])
    monkeypatch.setattr(machine, "decoding", lambda: [ok("decoding", "fast")])
    well = here("doctor", tiny, f"run.folder={tmp_path}")
    assert well.status == 0, well.out
    assert well.out.startswith("check ")
    ill = here("doctor", tiny, f"run.folder={tmp_path}", f"data.path={tmp_path / 'nowhere'}")
    assert ill.status == 1
    (line,) = [line for line in ill.out.splitlines() if " fail " in line]
    assert line.startswith("data ")
