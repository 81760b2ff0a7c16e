"""Streaming: shards from a server that fails now and then, drawn for ever."""

import logging
import socket
from itertools import islice
from pathlib import Path

import pytest
import torch

from esam_dist.data import open_train
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from tests.streamed import png, server, shard, sound

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("esam_dist.data.fetch.FIRST_PAUSE_SECONDS", 0.001)


def streamed(digits: Path, url: str, count: int, **values):
    cfg = DataKeys(
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
    cfg = DataKeys(path=digits, batch_size=1438, workers=0, image_size=8, augment="none")
    batch = next(open_train(cfg, seed=0, rank=0, world_size=1, device=CPU).batches(0))
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(batch.images, batch.labels, strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flaky_server_costs_retries_not_samples(digits, workers):
    faults = ["503", "half", "page", "unannounced"]
    with server(digits / "train", faults) as (url, counts):
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
    assert min(counts[fault] for fault in faults) >= 1


def test_the_cache_fetches_each_shard_once(digits, tmp_path):
    shards, cache = "/shard-{000000..000003}.tar", tmp_path / "cache"
    with server(digits / "train", ["unannounced", "page"]) as (url, counts):
        streamed(digits, url + shards, 200, stream_cache=cache)
        assert counts == {"unannounced": 4, "page": 4, "ok": 4}
        streamed(digits, url + shards, 40, stream_cache=cache)
        assert counts["ok"] == 4
    kept = sorted(path.read_bytes() for path in cache.iterdir())
    assert kept == sorted(path.read_bytes() for path in (digits / "train").glob("*.tar"))


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
    shards = f"http://127.0.0.1:{port}/shard-{{0..3}}.tar"
    assert "(unreachable: " in stopped(digits, shards, stream_tries=2, workers=1)


def stopped(digits: Path, shards: str, **values) -> str:
    """The one line that ends a run that gets no batch, though any share of the samples may be bad."""
    with pytest.raises(UserError, match=r"data\.stream: no batch can be filled.*repair the data") as caught:
        streamed(digits, shards, 1, max_skipped=1.0, **values)
    assert str(caught.value).isprintable()
    return str(caught.value)


USELESS = {
    "empty": b"",
    "page": b"<html>please log in</html>",
    "zeros": bytes(10240),
    "no sample": [("README", b"words")],
    "class names": [part for n in range(90) for part in ((f"{n}.png", png(n)), (f"{n}.cls", b"dog"))],
    "labels out of range": [part for n in range(90) for part in ((f"{n}.png", png(n)), (f"{n}.cls", b"10"))],
    "digits without end": [part for n in range(90) for part in ((f"{n}.png", png(n)), (f"{n}.cls", b"1" * 5000))],
    "no image": [(f"{n}.cls", b"1") for n in range(90)],
    "no label": [(f"{n}.png", png(n)) for n in range(90)],
    "undecodable": [part for n in range(90) for part in ((f"{n}.png", b"\x89PNG"), (f"{n}.cls", b"1"))],
    "twice": [part for n in range(90) for part in ((f"{n}.png", png(n)), (f"{n}.png", png(n)), (f"{n}.cls", b"1"))],
    "terminal codes": [part for n in range(90) for part in ((f"\33[2J\n{n}.png", png(n)), (f"\33[2J\n{n}.cls", b"x"))],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", USELESS)
def test_shards_of_which_nothing_can_be_used_stop_the_run(digits, tmp_path, kind, caplog):
    for number in range(4):
        content = USELESS[kind]
        if isinstance(content, bytes):
            (tmp_path / f"{number}.tar").write_bytes(content)
        else:
            shard(tmp_path / f"{number}.tar", content)
    for batch_size in (1, 32):
        stopped(digits, f"{tmp_path}/{{0..3}}.tar", stream_tries=1, batch_size=batch_size)
    assert caplog.records
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_scattered_lost_shards_do_not_stop_a_run_before_its_buffer_is_full(digits, tmp_path):
    for number in range(24):
        shard(tmp_path / f"{number}.tar", sound(20))
    for number in (3, 11, 19):
        (tmp_path / f"{number}.tar").unlink()
    # Fifty shards are drawn before a first sample leaves the buffer, and each that is lost among them.
    data, _ = streamed(digits, f"{tmp_path}/{{0..23}}.tar", 1, stream_tries=1, stream_samples=10_000, max_skipped=1.0)
    assert len(data._skipped._named) == 3
    assert set(data.skipped) == {"unreachable"}


def test_truncated_shards_and_bad_labels_are_counted(digits, tmp_path):
    whole = (digits / "train" / "shard-000000.tar").read_bytes()
    (tmp_path / "shard-0.tar").write_bytes(whole[: len(whole) // 2 + 700])
    image = png(0)
    bad = [("a.png", image), ("a.cls", b"10"), ("b.png", image), ("c.cls", b"1"), ("d.png", image), ("d.cls", b"x")]
    shard(tmp_path / "shard-1.tar", [*bad, *sound(90)])
    data, batches = streamed(digits, f"{tmp_path}/shard-{{0..1}}.tar", 20, max_skipped=1.0, stream_tries=1)
    assert len(batches) == 20
    assert set(data.skipped) == {"label", "empty", "broken_shard"}


def test_of_a_key_that_comes_twice_nothing_is_used(digits, tmp_path):
    members = [("a.png", png(999)), ("a.png", png(998)), ("a.cls", b"2"), *sound(5)]
    members += [("b.png", png(997)), ("b.cls", b"3"), ("b.png", png(996)), ("b.cls", b"4")]
    shard(tmp_path / "0.tar", members)
    data, batches = streamed(digits, f"{tmp_path}/{{0..0}}.tar", 10, batch_size=8, max_skipped=1.0)
    assert {int(label) for batch in batches for label in batch.labels} == {1}
    assert set(data.skipped) == {"broken_shard"}
    assert data._skipped._named == {f"{tmp_path}/0.tar:{key}" for key in "ab"}


def test_names_that_lead_elsewhere_are_names_and_nothing_more(digits, tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    members = [(f"../../{name}", data) for name, data in sound(20)] + [(f"/{name}", data) for name, data in sound(20)]
    shard(inside / "0.tar", members)
    data, batches = streamed(digits, f"{inside}/{{0..0}}.tar", 10, batch_size=8)
    assert len(batches) == 10
    assert data.skipped == {}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "a", "b"]


def test_a_resumed_stream_does_not_begin_again(digits):
    cfg = DataKeys(
        path=digits, stream=f"{digits}/train/shard-{{000000..000003}}.tar", stream_samples=1438, workers=0, image_size=8
    )
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    first, resumed, again = ([*islice(data.batches(start), 8)] for start in (0, 6400, 0))
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, again, strict=True))
    assert not any(torch.equal(one.images, other.images) for one, other in zip(first, resumed, strict=True))
    seen = [{image.numpy().tobytes() for batch in batches for image in batch.images} for batches in (first, resumed)]
    assert len(seen[0] & seen[1]) < len(seen[0]) * 3 / 4


def test_what_cannot_be_streamed_is_refused(digits):
    with pytest.raises(UserError, match="stream_samples = 0"):
        streamed(digits, "http://127.0.0.1:1/a.tar", 1, stream_samples=0)
    with pytest.raises(UserError, match="no such command"):
        streamed(digits, "pipe:no-such-command a.tar", 1)
