"""Secrets for a stream: taken from the environment where a shard is opened, and found nowhere else."""

import logging
from itertools import islice

import pytest
import torch

from esam_dist import config
from esam_dist.data import open_train
from esam_dist.data.fetch import FetchError, fetch
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from tests.commands import here

CPU = torch.device("cpu")
SECRET = "s3cr-t"


def opened(digits, stream, count=20):
    values = {"path": digits, "stream": stream, "stream_samples": 1438, "batch_size": 32, "workers": 0, "image_size": 8}
    cfg = DataKeys(**values, augment="none", stream_tries=1)
    data = open_train(cfg, seed=0, rank=0, world_size=1, device=CPU)
    return data, list(islice(data.batches(0), count))


@pytest.mark.parametrize(
    "stream",
    [
        "https://host/a-{0..3}.tar?X-Amz-Credential=key&X-Amz-Signature=s3cr-t",
        "https://host/a.tar?part=1&sig=s3cr-t",
        "https://host/a.tar?access_token=s3cr-t",
        "https://me:s3cr-t@host/a.tar",
        "https://s3cr-t@host/a.tar",
        "https://${USER}:s3cr-t@host/a.tar",
        "pipe:curl -H 'Authorization: Bearer s3cr-t' https://host/a-{0..3}.tar",
        'pipe:curl -H "X-Auth-Token: s3cr-t" https://host/a-{0..3}.tar',
        "pipe:curl -u me:s3cr-t https://host/a-{0..3}.tar",
        "pipe:AWS_SECRET_ACCESS_KEY=s3cr-t aws s3 cp s3://bucket/a.tar -",
        "pipe:AWS_SECRET_ACCESS_KEY='s3cr-t' aws s3 cp s3://bucket/a.tar -",
        "pipe:curl -H \"Authorization: 'Bearer s3cr-t'\" https://host/a.tar",
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(stream):
    with pytest.raises(UserError, match=r"data\.stream: holds what looks like .* write \$\{NAME\}") as error:
        config.parse({"data": {"stream": stream}}, "a.yaml")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "stream",
    [
        "https://host/train-{000000..000146}.tar?part=1",
        "https://host/a-{0..3}.tar?X-Amz-Credential=${KEY}&X-Amz-Signature=${SIGNATURE}",
        "https://me:${PASSWORD}@host/a.tar",
        "pipe:curl -H 'Authorization: Bearer ${TOKEN}' https://host/a-{0..3}.tar",
        'pipe:curl -H "Authorization: Bearer $TOKEN" https://host/a-{0..3}.tar',
        "pipe:curl -H \"Authorization: 'Bearer $TOKEN'\" -H 'X-Token: '\"$X\" https://host/a-{0..3}.tar",
        "pipe:AWS_SECRET_ACCESS_KEY='${KEY}' TOKEN=\"$T\" aws s3 cp s3://bucket/a.tar -",
        "pipe:curl -u ${ME}:${PASSWORD} https://host/a-{0..3}.tar",
        "s3://bucket/tokenized:v2/author=me/a-{0..3}.tar",
        "pipe:ssh me@host cat /data/a-{0..3}.tar",
    ],
)
def test_what_holds_no_secret_is_taken_as_it_stands(stream):
    assert config.parse({"data": {"stream": stream}}, "a.yaml").data.stream == stream


def test_a_variable_is_filled_in_where_a_shard_is_opened(digits, monkeypatch):
    monkeypatch.setenv("PLACE", f"{digits}/train\n")  # as a mounted secret ends
    data, batches = opened(digits, "${PLACE}/shard-{000000..000003}.tar")
    assert len(batches) == 20
    assert data.skipped == {}


def test_the_shell_fills_in_those_of_a_pipe(digits, monkeypatch):
    monkeypatch.setenv("PLACE", str(digits))
    data, batches = opened(digits, "pipe:cat ${PLACE}/train/shard-{000000..000003}.tar")
    assert len(batches) == 20
    assert data.skipped == {}


def test_a_variable_that_is_not_set_is_named_at_the_start(digits):
    with pytest.raises(UserError, match=r"data\.stream names \$\{NO_SUCH_NAME\}, which is not in the environment"):
        opened(digits, "https://host/a.tar?sig=${NO_SUCH_NAME}")


@pytest.mark.parametrize("value", [SECRET, f"{SECRET}\r\nx", f"two words {SECRET}"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a?sig=${NAME}", "s3://b/${NAME}", "/no/${NAME}", "no:${NAME}"])
def test_errors_and_warnings_show_the_name_and_not_the_value(url, value, monkeypatch, caplog):
    monkeypatch.setenv("NAME", value)
    with caplog.at_level(logging.WARNING), pytest.raises(FetchError) as error:
        fetch(url, tries=2, first_pause=0.001)
    for text in (str(error.value), caplog.text):
        assert "${NAME}" in text
        assert SECRET not in text


def test_no_file_of_the_run_holds_the_value(tiny, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", f"{digits}/train")
    monkeypatch.setattr("sys.argv", ["esam-dist", "train", "data.stream=${PLACE}/shard-{000000..000003}.tar"])
    stream = ["data.stream=${PLACE}/shard-{000000..000003}.tar", "data.stream_samples=80", "train.max_steps=2"]
    answer = here("train", tiny, f"run.folder={tmp_path / 'run'}", *stream)
    assert answer.status == 0, answer.err
    texts = [path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert sum("${PLACE}" in text for text in texts) == 2, "config.yaml and environment.json"
    assert not any(f"{digits}/train" in text for text in [*texts, answer.out, answer.err])
