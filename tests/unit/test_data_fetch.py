"""Fetching one shard: whole, or tried again, or given up; in the cache only what is whole."""

import gzip
import multiprocessing
import os
import shlex
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from esam_dist.data.fetch import FetchError, fetch
from tests.streamed import server, shard, sound


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("esam_dist.data.fetch.FIRST_PAUSE_SECONDS", 0.001)


def fetch_as_the_only_process(url: str, cache: Path, expected: bytes) -> None:
    # In containers that share a volume, process ids are often equal.
    os.getpid = lambda: 7
    with fetch(url, tries=1, cache=cache) as file:
        assert file.read() == expected


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_fetch_one_shard_at_once_into_one_cache_do_not_disturb_each_other(digits, tmp_path):
    fork, shard = multiprocessing.get_context("fork"), digits / "train" / "shard-000000.tar"
    with server(digits / "train", ["slow", "half", "slow", "slow"]) as (url, _):
        arguments = (f"{url}/{shard.name}", tmp_path, shard.read_bytes())
        processes = [fork.Process(target=fetch_as_the_only_process, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
            time.sleep(0.05)
        for process in processes:
            process.join(60)
    # The one whose connection broke takes nothing from the others.
    assert [process.exitcode for process in processes] == [0, 1, 0, 0]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [shard.read_bytes()]


def test_a_cached_shard_is_on_the_disk_before_it_has_its_name(digits, tmp_path, monkeypatch):
    shard, flushed = digits / "train" / "shard-000000.tar", []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append([path.suffix for path in tmp_path.iterdir()]))
    fetch(str(shard), tries=1, cache=tmp_path).close()
    assert flushed == [[".partial"], [".tar"]]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_shards_are_fetched_and_not_taken_for_whole_when_cut(tmp_path, mode):
    path = tmp_path / "0.tar"
    shard(path, sound(60), mode)
    with fetch(str(path), tries=1) as file:
        assert file.read() == path.read_bytes()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FetchError, match="is no whole tar") as caught:
        fetch(str(path), tries=1)
    assert caught.value.reason == "broken_shard"


@pytest.mark.parametrize("cut", [512 * 20, 512 * 20 + 100])
def test_a_shard_cut_between_its_members_or_within_is_not_whole(tmp_path, cut):
    path = tmp_path / "0.tar"
    shard(path, sound(60))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FetchError, match="is no whole tar"):
        fetch(str(path), tries=1)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("place", [512 * 20 + 3, 512 * 20 + 150])
def test_a_shard_with_a_damaged_header_in_its_middle_is_not_whole(tmp_path, mode, place):
    path = tmp_path / "0.tar"
    shard(path, sound(60))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        assert 512 * 20 in {member.offset for member in tar}
    data[place] ^= 0x15
    path.write_bytes(gzip.compress(data) if mode == "w:gz" else data)
    with pytest.raises(FetchError, match="is no whole tar") as caught:
        fetch(str(path), tries=1)
    assert caught.value.reason == "broken_shard"


def test_what_a_server_says_is_logged_in_one_line_that_no_terminal_obeys(caplog):
    class Rude(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503, "go \x1b[2J away")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Rude) as rude:
        threading.Thread(target=rude.serve_forever, daemon=True).start()
        with pytest.raises(FetchError, match=r"go \\x1b\[2J away"):
            fetch(f"http://127.0.0.1:{rude.server_port}/0.tar", tries=2)
        rude.shutdown()
    assert r"go \x1b[2J away" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("command", "reason", "words"),
    [
        ("head -c 5000 {0}", "broken_shard", "is no whole tar"),
        ("head -c 5000 {0} | cat", "broken_shard", "is no whole tar"),
        ("cat {0}; exit 3", "unreachable", "status 3"),
        ("echo $$ >> {1}/pids; head -c 5000 {0}; sleep 1000 | cat", "unreachable", "did nothing for 0.3 seconds"),
        ("echo $$ >> {1}/pids; cat {0}; exec >&-; sleep 1000 | cat", "unreachable", "did nothing for 0.3 seconds"),
    ],
)
def test_a_pipe_that_breaks_or_gets_stuck_is_tried_again_and_leaves_no_process(
    digits, tmp_path, monkeypatch, command, reason, words
):
    monkeypatch.setattr("esam_dist.data.fetch.TIMEOUT_SECONDS", 0.3)
    path = shlex.quote(str(digits / "train" / "shard-000000.tar"))
    with pytest.raises(FetchError, match=rf"{words}.*\(2 tries\)") as caught:
        fetch("pipe:" + command.format(path, tmp_path), tries=2)
    assert caught.value.reason == reason
    pids = (tmp_path / "pids").read_text().split() if "pids" in command else []
    assert len(pids) == 2 * ("pids" in command)
    groups = [os.getpgid(process.pid) for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]
    assert not {*map(int, pids)} & {*groups}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("scheme", ["", "file:"])
def test_a_named_pipe_under_a_shards_name_is_not_waited_for(tmp_path, scheme):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(FetchError, match="no regular file") as caught:
        fetch(f"{scheme}{tmp_path}/0.tar", tries=1)
    assert caught.value.reason == "unreachable"


def test_a_command_that_stops_reading_early_is_no_fault(digits):
    path = digits / "train" / "shard-000000.tar"
    size = path.stat().st_size
    with fetch(f"pipe:bash -o pipefail -c 'cat {path} /dev/zero | head -c {size}'", tries=1) as file:
        assert file.read() == path.read_bytes()


def test_fetch_gives_up_after_its_tries(tmp_path):
    shard(tmp_path / "a", sound(3))
    with server(tmp_path, ["503", "half", "503"]) as (url, counts):
        with pytest.raises(FetchError, match=r"/a: .*\(3 tries\)") as caught:
            fetch(f"{url}/a", tries=3)
        assert caught.value.reason == "unreachable"
        with fetch(f"{url}/a", tries=3) as file:
            assert file.read() == (tmp_path / "a").read_bytes()
    assert counts == {"503": 2, "half": 1, "ok": 1}
