"""The end of a run: what a Pushgateway gets, and that nothing there fails a run or leaves a sink open."""

from http.client import InvalidURL

import pytest

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.metrics import Metrics
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks
from tests.commands import free_port


def build(folder, **cfg):
    return Metrics(folder, MetricsKeys(**cfg), Ranks(), {}, Progress(planned_steps=100))


def test_missing_gateway_is_a_warning_and_no_failure(tmp_path, caplog):
    metrics = build(tmp_path, gateway="http://127.0.0.1:9")
    metrics.close()
    assert "metrics.gateway = http://127.0.0.1:9: the final values were not taken" in caplog.text


@pytest.mark.parametrize("error", [OSError("away"), InvalidURL("nonnumeric port"), ValueError("no URL")])
def test_no_fault_of_the_gateway_fails_a_run_that_is_done(tmp_path, caplog, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("prometheus_client.push_to_gateway", refuse)
    build(tmp_path, gateway="http://127.0.0.1:9").close()
    assert f"the final values were not taken ({error})" in caplog.text


def test_every_sink_is_closed_whatever_another_one_raises(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no room on the disk")

    metrics = build(tmp_path, port=free_port(), tensorboard=True)
    server, lines = metrics._server, metrics._rows
    monkeypatch.setattr(metrics._board, "close", refuse)
    monkeypatch.setattr(metrics, "_push", refuse)
    monkeypatch.setattr(metrics, "_cfg", MetricsKeys(gateway="http://127.0.0.1:9"))
    with pytest.raises(RuntimeError, match="no room"):
        metrics.close()
    assert lines._file.closed
    assert server._clients._listener.fileno() == -1


@pytest.mark.parametrize(
    "gateway",
    ["http://host:port", "http://host:99999", "ftp://host:21", "http://", "http://a b:9091", "h:1\n", "h:1?x"],
)
def test_gateway_that_is_no_address_is_refused(gateway):
    with pytest.raises(UserError, match=r"metrics.gateway = .* is no address; give http://HOST:9091"):
        config.parse({"metrics": {"gateway": gateway}}, "a.yaml")


@pytest.mark.parametrize("gateway", ["http://host:9091", "host:9091", "https://h/prefix", "http://[::1]:9091"])
def test_gateway_that_is_an_address_is_taken(gateway):
    assert config.parse({"metrics": {"gateway": gateway}}, "a.yaml").metrics.gateway == gateway


def test_password_in_the_gateway_is_refused_and_not_repeated():
    with pytest.raises(UserError, match=r"metrics\.gateway: holds a password") as error:
        config.parse({"metrics": {"gateway": "http://me:secret@host:9091"}}, "a.yaml")
    assert "secret" not in str(error.value)
