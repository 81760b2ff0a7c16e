"""Streaming: shards from a server that fails now and then, drawn for ever."""

import contextlib
import logging
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
import torch

from esam_dist import config
from esam_dist.data import open_train
from esam_dist.data.fetch import FetchError, fetch
from esam_dist.errors import UserError

CPU = torch.device("cpu")


class Flaky(BaseHTTPRequestHandler):
    """Serves a folder; of each file the first answers are faults (a status, or `half`), the later ones whole.

    Faults by turns over all files would not do: of two workers, one could meet nothing else.
    """

    def __init__(self, root: Path, faults: dict[str, Iterator[str]], counts: Counter, *args):
        self.root, self.faults, self.counts = root, faults, counts
        super().__init__(*args)

    def do_GET(self):
        path = self.root / self.path.lstrip("/")
        fault = next(self.faults[self.path], "ok") if path.exists() else "404"
        self.counts[fault] += 1
        if fault.isdigit():
            self.send_error(int(fault))
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if fault == "ok" else data[: len(data) // 2])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def server(root: Path, faults: list[str]):
    counts: Counter[str] = Counter()
    handler = partial(Flaky, root, defaultdict(lambda: iter(faults)), counts)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}", counts
        finally:
            served.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("esam_dist.data.fetch.FIRST_PAUSE_SECONDS", 0.001)


def streamed(digits: Path, url: str, count: int, **values):
    cfg = config.Data(
        **{
            "path": digits,
            "stream": url,
            "stream_samples": 1438,
            "batch_size": 32,
            "workers": 0,
            "image_size": 8,
            "augment": "none",
            **values,
        }
    )
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    return data, list(islice(data.batches(0), count))


def known_pairs(digits: Path) -> set:
    cfg = config.Data(path=digits, batch_size=1438, workers=0, image_size=8, augment="none")
    batch = next(open_train(cfg, seed=0, rank=0, world_size=1, device=CPU).batches(0))
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(batch.images, batch.labels, strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flaky_server_costs_retries_not_samples(digits, workers):
    with server(digits / "train", ["503", "half", "500"]) as (url, counts):
        data, batches = streamed(digits, url + "/shard-{000000..000003}.tar", 30, workers=workers)
    assert all(batch.images.shape == (32, 3, 8, 8) for batch in batches)
    pairs = {
        (image.numpy().tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    }
    assert pairs <= known_pairs(digits)
    assert len(pairs) > 300
    assert data.skipped == {}
    assert min(counts["503"], counts["half"], counts["500"]) >= 1


def test_the_cache_fetches_each_shard_once(digits, tmp_path):
    with server(digits / "train", []) as (url, counts):
        streamed(digits, url + "/shard-{000000..000003}.tar", 60, stream_cache=tmp_path / "cache")
        assert counts["ok"] <= 4
        again = counts["ok"]
        streamed(digits, url + "/shard-{000000..000003}.tar", 40, stream_cache=tmp_path / "cache")
    assert counts["ok"] <= max(again, 4)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_pipe_is_read(digits):
    data, batches = streamed(digits, f"pipe:cat {digits}/train/shard-{{000000..000003}}.tar", 30)
    assert len(batches) == 30
    assert data.skipped == {}


def test_s3_goes_through_the_command_line_tool(digits, tmp_path, monkeypatch):
    tool = tmp_path / "aws"
    tool.write_text(f'#!/bin/sh\ntest "$1 $2 $4" = "s3 cp -" && cat {digits}/train/"$(basename "$3")"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    _, batches = streamed(digits, "s3://bucket/shard-{000000..000003}.tar", 20)
    assert len(batches) == 20


def test_a_shard_that_stays_away_is_skipped_counted_and_named(digits, caplog):
    with caplog.at_level(logging.WARNING), server(digits / "train", []) as (url, _):
        data, batches = streamed(digits, url + "/shard-{000002..000004}.tar", 50, stream_tries=2)
    assert len(batches) == 50
    assert set(data.skipped) == {"unreachable"}
    assert "shard-000004.tar" in caplog.text


def test_a_dead_server_stops_the_run_with_one_line(digits):
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    with pytest.raises(UserError, match=r"no sample of a whole batch.*\(unreachable\)") as caught:
        streamed(digits, f"http://127.0.0.1:{port}/shard-{{0..3}}.tar", 1, stream_tries=2, workers=1)
    assert "\n" not in str(caught.value)


def test_truncated_shards_and_bad_labels_are_counted(digits, tmp_path):
    import io
    import tarfile

    shard = (digits / "train" / "shard-000000.tar").read_bytes()
    (tmp_path / "shard-0.tar").write_bytes(shard[: len(shard) // 2 + 700])
    image = shard[512:1000]
    with tarfile.open(tmp_path / "shard-1.tar", "w") as tar:
        for name, data in [
            ("a.png", image),
            ("a.cls", b"10"),
            ("b.png", image),
            ("c.cls", b"1"),
            ("d.png", image),
            ("d.cls", b"x"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data, batches = streamed(digits, f"{tmp_path}/shard-{{0..1}}.tar", 20, max_skipped=1.0)
    assert len(batches) == 20
    assert {"label", "empty", "broken_shard"} <= set(data.skipped)


def test_a_resumed_stream_does_not_begin_again(digits):
    cfg = config.Data(
        path=digits, stream=f"{digits}/train/shard-{{000000..000003}}.tar", stream_samples=1438, workers=0, image_size=8
    )
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    first, resumed = next(data.batches(0)), next(data.batches(6400))
    assert not torch.equal(first.labels, resumed.labels)


def test_what_cannot_be_streamed_is_refused(digits):
    with pytest.raises(UserError, match="stream_samples = 0"):
        streamed(digits, "http://127.0.0.1:1/a.tar", 1, stream_samples=0)
    with pytest.raises(UserError, match="no such command"):
        streamed(digits, "pipe:no-such-command a.tar", 1)


def test_fetch_gives_up_after_its_tries(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    with server(tmp_path, ["503", "half", "503"]) as (url, counts):
        with pytest.raises(FetchError, match=r"/a: .*\(3 tries\)"):
            fetch(f"{url}/a", tries=3, first_pause=0.001)
        with fetch(f"{url}/a", tries=3, first_pause=0.001) as file:
            assert file.read() == b"x" * 1000
    assert counts == {"503": 2, "half": 1, "ok": 1}
