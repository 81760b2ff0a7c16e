"""One job at a time in a run folder, also after kills, on other hosts, and where two take over at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from esam_dist import lock, process
from esam_dist.errors import UserError
from esam_dist.lock import Holder, Lock, locked
from esam_dist.ranks import Ranks
from tests.commands import environment


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same with shorter times."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)


def held(folder, holder, age=0.0):
    """The lock of `holder`, last touched `age` seconds ago."""
    path = folder / lock.FILE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def elsewhere(**changes):
    return replace(Holder.here(), host="node7", place="another boot", pid=4242, **changes)


def a_process_that_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def test_a_folder_is_held_for_the_length_of_the_block(tmp_path):
    with locked(tmp_path / "run", Ranks()) as check:
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
        holder = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), os.uname().nodename)
        check()
        with pytest.raises(UserError), locked(tmp_path / "run", Ranks()):
            pass
        check()
    assert list((tmp_path / "run").iterdir()) == []


def test_it_is_released_on_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path, Ranks()):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_touches_the_folder(tmp_path):
    with locked(tmp_path / "run", Ranks(rank=1, world_size=2)) as check:
        check()
    assert not (tmp_path / "run").exists()


def test_the_second_job_is_refused_by_host_and_process(tmp_path):
    held(tmp_path, replace(Holder.here(), host="here", since="2026-01-02 03:04:05"))
    with pytest.raises(
        UserError, match=f"process {os.getpid()} on here trains there since 2026-01-02 03:04:05"
    ) as error:
        Lock(tmp_path).take()
    assert "choose another run.folder" in str(error.value)


def test_a_process_of_this_machine_that_lives_is_believed_however_old_its_sign_of_life(tmp_path):
    held(tmp_path, Holder.here(), age=10_000)
    with pytest.raises(UserError, match="trains there"):
        Lock(tmp_path).take()


@pytest.mark.parametrize("gone", ["ended", "another process with its id", "killed, and nobody asked"])
def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(tmp_path, gone, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000.0)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    began = process.began(sleeper.pid)
    if gone == "another process with its id":
        held(tmp_path, replace(Holder.here(), began="1"))
    else:
        held(tmp_path, replace(Holder.here(), pid=sleeper.pid, began=began))
    sleeper.kill()
    if gone == "ended":
        sleeper.wait()
    else:
        # A zombie: dead, though its id is still known.
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    start = time.monotonic()
    with locked(tmp_path, Ranks()):
        assert time.monotonic() - start < 1.0
    sleeper.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_job_elsewhere_that_gives_signs_of_life_is_refused_as_soon_as_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000.0)
    path = held(tmp_path, elsewhere())
    beat = threading.Timer(0.3, os.utime, (path,))
    beat.start()
    with pytest.raises(UserError, match="process 4242 on node7 trains there"):
        Lock(tmp_path).take()
    beat.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]


def test_a_job_elsewhere_without_a_sign_of_life_is_waited_for_and_replaced(tmp_path, caplog):
    held(tmp_path, elsewhere())
    start = time.monotonic()
    with locked(tmp_path, Ranks()):
        assert 0.4 < time.monotonic() - start < 5
    assert "process 4242 on node7 is gone" in caplog.text


def test_a_job_elsewhere_that_died_long_ago_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)
    held(tmp_path, elsewhere(), age=61)
    with locked(tmp_path, Ranks()):
        pass


def test_a_sign_of_life_dated_ahead_of_the_clock_is_watched_no_longer(tmp_path):
    held(tmp_path, elsewhere(), age=-3600)
    start = time.monotonic()
    with locked(tmp_path, Ranks()):
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b'{"who": 3}', b"\xff" * 9, b"[" * 100_000])
def test_a_lock_that_nobody_can_read_is_given_time_and_then_replaced(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with locked(tmp_path, Ranks()):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_name_from_outside_reaches_no_terminal_as_it_is(tmp_path):
    held(tmp_path, replace(Holder.here(), host="a\nb\x1b[2J"))
    with pytest.raises(UserError) as error:
        Lock(tmp_path).take()
    assert str(error.value).isprintable()


def test_the_holder_touches_its_lock_and_a_lock_that_was_removed_is_made_again(tmp_path):
    with locked(tmp_path, Ranks()):
        path = tmp_path / "run.lock"
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
        path.unlink()
        wait_until(path.exists)
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_who_was_taken_over_learns_of_it_before_it_writes(tmp_path):
    with locked(tmp_path, Ranks()) as check:
        path = held(tmp_path, elsewhere())
        with pytest.raises(UserError, match=r"was taken over by process 4242 on node7"):
            check()
    assert json.loads(path.read_text())["pid"] == 4242, "another's lock was removed"


def test_of_two_who_take_over_the_later_gives_back_what_it_took(tmp_path):
    stale = held(tmp_path, elsewhere(), age=100).read_bytes()
    first, late = Lock(tmp_path), Lock(tmp_path)
    first.take()
    # It had judged the old one before the first was there.
    late._move_away(stale)
    first.check()
    assert (tmp_path / "run.lock").read_bytes() == first._content
    with pytest.raises(UserError, match="trains there"):
        late.take()
    first.release()


def test_of_many_who_take_over_at_once_one_gets_it(tmp_path):
    """Real processes, each with the lock of a dead one before it, again and again."""
    program = """
import sys, time
from pathlib import Path
from esam_dist.errors import UserError
from esam_dist.lock import Lock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
lock = Lock(folder)
try:
    lock.take()
except UserError:
    print("refused", flush=True)
else:
    time.sleep(0.5)
    lock.check()
    print("held", flush=True)
sys.stdin.readline()
"""
    gone = a_process_that_is_gone()
    held(tmp_path, replace(Holder.here(), pid=gone))
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    answers = [job.stdout.readline().strip() for job in jobs]
    for job in jobs:
        job.communicate("end\n")
    assert sorted(answers) == ["held", "refused", "refused", "refused"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"run.folder = .*cannot be written \(Read-only file system\)"):
        Lock(tmp_path).take()


def test_a_lock_that_finds_no_room_leaves_none(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left"):
        Lock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_ill_for_a_while_costs_the_holder_nothing(tmp_path, monkeypatch):
    with locked(tmp_path, Ranks()) as check:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "ill")))
            check()
            time.sleep(0.2)
        check()
    assert list(tmp_path.iterdir()) == []


def test_when_a_process_began_is_told_while_it_lives():
    assert process.began(os.getpid()) == process.began(os.getpid())
    assert int(process.began(os.getpid())) > int(process.began(1))
    assert process.began(a_process_that_is_gone()) is None
    assert process.began(2**40) is None


def test_a_killed_job_is_followed_at_once_on_the_same_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000.0)
    program = """
import sys, time
from pathlib import Path
from esam_dist.lock import Lock
Lock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(100)
"""
    job = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment(), stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {job.pid} on"):
        Lock(tmp_path).take()
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    with locked(tmp_path, Ranks()):
        pass
