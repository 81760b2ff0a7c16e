"""DeepSpeed over ssh: its runner on one host starts the ranks on three, each behind a server of its own."""

import contextlib
from pathlib import Path

import pytest
from hosts import hosts
from servers import ROOT, tool, until
from ssh import ssh_between
from test_several_nodes import NAMES, launch, rows, script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def three(tmp_path):
    with hosts(tmp_path, NAMES) as made:
        yield made


@pytest.fixture
def over_ssh(tmp_path, three):
    """A function that starts a command on the first host, from which it reaches all three by ssh."""
    for needed in ("pdsh", "pkill"):
        tool(needed)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    # what DeepSpeed passes on of the environment is PYTHONPATH, and this file in the folder that it is started in
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    with ssh_between(three, tmp_path / "ssh") as mounts:

        def begin(command):
            env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            return three[0].start(command, tmp_path / "alpha.log", mounts=mounts, env=env, cwd=tmp_path)

        yield begin


def by_launch(digits, tmp_path, *overrides):
    options = ["--with=deepspeed", f"--hostfile={tmp_path / 'hostfile'}"]
    return launch(digits, tmp_path, *options, overrides=["engine.name=deepspeed", *overrides])


def test_three_hosts_train(tmp_path, digits, over_ssh):
    process = over_ssh(by_launch(digits, tmp_path, "train.max_steps=6"))
    log = tmp_path / "alpha.log"
    assert process.wait(500) == 0, log.read_text()
    assert rows(tmp_path)[-1]["samples"] == 6 * 16 * 3
    for rank in range(3):
        assert f"[rank {rank}]" in log.read_text()


def ranks_on(host):
    found = []
    for number in host.processes():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{number}/cmdline").read_bytes())
    return [words for words in found if b"\0esam_dist\0train\0" in words]


def by_script(digits, tmp_path, *overrides):
    overrides = ["engine.name=deepspeed", *overrides]
    return script("deepspeed/hostfile.sh", digits, tmp_path, overrides, HOSTFILE=tmp_path / "hostfile")


def test_script_trains_and_tells_what_the_user_got_wrong(tmp_path, digits, over_ssh):
    wrong = over_ssh(by_script(digits, tmp_path, "method.gamma=2"))
    assert wrong.wait(200) == 2, (tmp_path / "alpha.log").read_text()
    told = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
    assert "esam-dist: error: method.gamma = 2 is refused" in told
    assert "Traceback" not in told
    process = over_ssh(by_script(digits, tmp_path, "train.max_steps=6"))
    assert process.wait(500) == 0, (tmp_path / "alpha.log").read_text()
    assert rows(tmp_path)[-1]["samples"] == 6 * 16 * 3


def test_error_that_only_ranks_can_see_is_told_with_status_2(tmp_path, digits, over_ssh):
    process = over_ssh(by_launch(digits, tmp_path, "model.num_classes=5"))
    log = tmp_path / "alpha.log"
    assert process.wait(200) == 2, log.read_text()
    assert "[rank 0] esam-dist: error: model.num_classes = 5" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_sigterm_stops_all_ranks_with_a_checkpoint(tmp_path, digits, over_ssh, three):
    process = over_ssh(by_launch(digits, tmp_path, "train.max_steps=100000", "checkpoint.every_steps=100000"))
    until(lambda: len(rows(tmp_path)) > 2, 300, "three hosts train")
    assert all(map(ranks_on, three))
    process.terminate()
    assert process.wait(120) == 143, (tmp_path / "alpha.log").read_text()
    until(lambda: not any(map(ranks_on, three)), 60, "no rank is left on any host")
    last = rows(tmp_path)[-1]["step"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{last:08d}"]
