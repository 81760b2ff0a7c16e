"""The sinks of one rank: what a scraper, a reader of metrics.jsonl and somebody at a terminal get."""

import errno
import json
import logging
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from esam_dist.errors import UserError
from esam_dist.metrics import Metrics, TrainRow, ValidationRow, jsonl, rewind
from esam_dist.metrics.keys import MetricsKeys
from esam_dist.metrics.prometheus import HISTORY, PHASES, REASONS, names
from esam_dist.progress import Progress
from esam_dist.ranks import Ranks

ROW = TrainRow(
    step=10,
    epoch=0.5,
    loss=1.25,
    lr=0.1,
    grad_norm=2.0,
    sharpness=0.03,
    kept_fraction=0.5,
    images_per_second=800.0,
    step_seconds=0.16,
    data_wait_seconds=0.01,
    rho=0.05,
    beta=0.6,
    gamma=0.5,
    selection_threshold=0.2,
    samples=1280,
    kept_samples=640,
    skipped_perturbations=1,
    skipped_updates=3,
    skipped_samples={"checksum": 2},
    phases={"ascent": [0.1, 0.3], "descent": [0.2, 0.2]},
)
VALIDATION = ValidationRow(
    step=10, epoch=0.5, accuracy=0.9, top5_accuracy=0.99, loss=0.3, seconds=1.5, averaged_accuracy=0.91
)
DESIGN_KEYS = ["kind", "step", "epoch", "loss", "lr", "grad_norm", "sharpness", "kept_fraction", "images_per_second"]


BEGINNING = Progress(planned_steps=100)
ROOT = Path(__file__).resolve().parents[2]


def build(folder, rank=0, standing=BEGINNING, **cfg):
    run_info = {"model": "cifar_resnet8", "method": "esam"}
    return Metrics(folder, MetricsKeys(**cfg), Ranks(rank, rank, 2), run_info, standing)


@pytest.fixture
def metrics(tmp_path):
    built = build(tmp_path)
    yield built
    built.close()


def test_train_row_reaches_every_prometheus_name(metrics):
    metrics.progress(10)
    metrics.train(ROW)
    metrics.validation(VALIDATION)
    metrics.checkpoint_begun(0.2)
    metrics.checkpoint_saved(10, 0.7)
    value = metrics.registry.get_sample_value
    assert value("esam_step") == 10
    assert value("esam_train_loss") == 1.25
    assert value("esam_samples_total") == 1280
    assert value("esam_kept_samples_total") == 640
    assert value("esam_skipped_perturbations_total") == 1
    assert value("esam_skipped_updates_total") == 3
    assert value("esam_skipped_samples_total", {"rank": "0", "reason": "checksum"}) == 2
    assert value("esam_phase_seconds_sum", {"rank": "0", "phase": "ascent"}) == pytest.approx(0.4)
    assert value("esam_phase_seconds_count", {"rank": "0", "phase": "checkpoint"}) == 1
    assert value("esam_phase_seconds_sum", {"rank": "0", "phase": "validate"}) == 1.5
    assert value("esam_validation_best_epoch") == 0.5
    assert value("esam_run_info", {"model": "cifar_resnet8", "method": "esam", "rank": "0"}) == 1
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    exposed |= {name + "_info" for name in exposed}
    assert set(names()) <= exposed


def test_values_that_do_not_exist_yet_are_absent_and_not_zero(metrics):
    value = metrics.registry.get_sample_value
    assert value("esam_train_loss") is None
    assert value("esam_checkpoint_last_success_timestamp_seconds") is None
    assert value("esam_samples_total") == 0
    assert all(value("esam_skipped_samples_total", {"rank": "0", "reason": reason}) == 0 for reason in REASONS)
    assert all(value("esam_phase_seconds_count", {"rank": "0", "phase": phase}) == 0 for phase in PHASES)
    metrics.train(ROW)
    assert value("esam_selection_threshold") == 0.2
    metrics.train(replace(ROW, sharpness=None, selection_threshold=math.nan))
    assert value("esam_sharpness") is None
    assert value("esam_selection_threshold") is None
    assert value("esam_train_loss") == 1.25


def test_counters_grow_by_what_is_new(metrics):
    metrics.train(ROW)
    metrics.train(replace(ROW, step=20, samples=2560))
    assert metrics.registry.get_sample_value("esam_samples_total") == 2560
    assert metrics.registry.get_sample_value("esam_kept_samples_total") == 1280


def test_reasons_are_those_of_the_documentation_and_of_the_code():
    text = (ROOT / "docs/data.md").read_text()
    documented = re.search(r"Reasons: (.*?)A shard that is replaced", text, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", documented)) == set(REASONS)
    sources = "".join(path.read_text() for path in (ROOT / "esam_dist/data").glob("*.py"))
    raised = re.findall(r'SampleError\(\s*"(\w+)"|Skip\(\w+, "(\w+)"|kind = "(\w+)" if .* else "(\w+)"', sources)
    assert set("".join(f"{word} " for found in raised for word in found).split()) == set(REASONS)


def test_what_earlier_processes_did_is_known_at_once_on_rank_0_and_on_others_when_the_ranks_have_met(tmp_path):
    progress = Progress(planned_steps=100, step=9, samples=1000, restarts=3, not_finite=1)
    first, second = build(tmp_path, standing=progress), build(tmp_path, rank=1, standing=None)
    told = [*HISTORY, "esam_planned_steps", "esam_step"]
    assert [first.registry.get_sample_value(name) for name in told] == [3, 1, 100, 9]
    assert [second.registry.get_sample_value(name) for name in told] == [None] * 4
    second.take_up(progress)
    assert [second.registry.get_sample_value(name) for name in told] == [3, 1, 100, 9]
    for metrics in (first, second):
        metrics.train(ROW)
        assert metrics.registry.get_sample_value("esam_samples_total") == 280
        metrics.close()
    assert jsonl.read(tmp_path)[0]["restarts"] == 3


def test_an_end_for_what_is_not_finite_is_counted_and_a_skipped_update_is_none(metrics):
    metrics.train(replace(ROW, loss=math.nan, skipped_updates=10))
    assert metrics.registry.get_sample_value("esam_loss_not_finite_total") == 0
    metrics.not_finite()
    assert metrics.registry.get_sample_value("esam_loss_not_finite_total") == 1


def test_a_checkpoint_that_was_not_written_is_counted_and_is_not_the_last(tmp_path, metrics):
    sample = metrics.registry.get_sample_value
    assert sample("esam_checkpoint_failures_total") == 0
    metrics.checkpoint_saved(10, 0.5)
    metrics.checkpoint_failed(20)
    assert sample("esam_checkpoint_failures_total") == 1
    assert sample("esam_checkpoint_last_step") == 10
    assert jsonl.read(tmp_path)[-1] == {"kind": "checkpoint_failed", "step": 20}


def test_jsonl_rows_have_the_keys_of_the_contract_in_order(tmp_path, metrics):
    metrics.train(ROW)
    metrics.validation(VALIDATION)
    train, validation = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert list(train)[:9] == DESIGN_KEYS
    assert {"step_seconds", "data_wait_seconds", "samples", "restarts", "time"} <= set(train)
    assert train["phases"] == {"ascent": pytest.approx(0.2), "descent": 0.2}
    assert list(validation)[:6] == ["kind", "step", "epoch", "accuracy", "top5_accuracy", "loss"]


def test_jsonl_stays_valid_json_when_values_are_not_finite(tmp_path, metrics):
    metrics.train(replace(ROW, loss=math.nan, sharpness=None, phases={"data": [math.inf], "score": []}))
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["loss"] is None
    assert row["sharpness"] is None
    assert row["phases"] == {"data": None}
    assert math.isnan(metrics.registry.get_sample_value("esam_train_loss"))


def test_only_rank_zero_writes_files(tmp_path):
    metrics = build(tmp_path, rank=1, tensorboard=True)
    metrics.train(ROW)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_rewind_leaves_no_row_after_the_resumed_step_and_no_torn_line(tmp_path):
    metrics = build(tmp_path)
    for step in (10, 20, 30):
        metrics.train(replace(ROW, step=step))
    metrics.checkpoint_saved(20, 0.1)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 15')
    assert rewind(tmp_path, 20) == 2
    again = build(tmp_path)
    again.train(replace(ROW, step=30))
    again.close()
    rows = jsonl.read(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 10),
        ("train", 20),
        ("checkpoint", 20),
        ("train", 30),
    ]


def test_rewind_of_a_new_run_keeps_nothing_and_of_no_run_does_nothing(tmp_path):
    assert rewind(tmp_path, 0) == 0
    metrics = build(tmp_path)
    metrics.validation(replace(VALIDATION, step=0))
    metrics.close()
    assert rewind(tmp_path, 0) == 1
    assert jsonl.read(tmp_path) == []


def test_reader_passes_over_a_line_that_is_still_being_written(tmp_path, metrics):
    metrics.train(ROW)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 20}')
    assert [row["step"] for row in jsonl.read(tmp_path)] == [10]


def test_lines_go_to_the_log_where_no_terminal_is(metrics, caplog):
    with caplog.at_level(logging.INFO, logger="esam_dist"):
        metrics.train(ROW)
        metrics.validation(VALIDATION)
        metrics.checkpoint_saved(10, 0.5)
    assert "step 10/100  epoch 0.50  loss 1.2500" in caplog.text
    assert "validation accuracy 0.9000" in caplog.text
    assert "checkpoint saved in 0.5 s" in caplog.text


def test_bar_shows_the_step_and_continues_after_a_resume(tmp_path, capsys):
    metrics = build(tmp_path, progress="bar")
    for step in range(41, 61):
        metrics.progress(step)
    metrics.train(replace(ROW, step=60))
    metrics.validation(replace(VALIDATION, step=60))
    metrics.close()
    error = capsys.readouterr().err
    assert "60/100" in error
    assert "loss 1.2500" in error
    assert "validation accuracy 0.9000" in error


def test_tensorboard_gets_numbers_and_phases(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = build(tmp_path, tensorboard=True)
    metrics.train(replace(ROW, sharpness=None))
    metrics.validation(VALIDATION)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "phases/ascent", "validation/accuracy"} <= tags
    assert "train/sharpness" not in tags
    assert events.Scalars("train/loss")[0].value == 1.25


class FullDisk:
    """A writer of TensorBoard's on a disk without room."""

    def __init__(self):
        self.calls = 0

    def add_scalar(self, *args):
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_events_that_a_full_disk_refuses_end_nothing_and_are_said_once(tmp_path, caplog):
    metrics = build(tmp_path, tensorboard=True)
    writer = metrics._board._writer = FullDisk()
    for _ in range(3):
        metrics.train(ROW)
    metrics.close()
    assert writer.calls == 1
    lines = [record.getMessage() for record in caplog.records if "tensorboard" in record.getMessage()]
    assert lines == [f"{tmp_path / 'tensorboard'}: no more events can be written (No space left on device)"]
    assert len(jsonl.read(tmp_path)) == 3


def test_progress_is_nearly_free(metrics):
    start = time.perf_counter()
    for step in range(10_000):
        metrics.progress(step)
    assert (time.perf_counter() - start) / 10_000 < 100e-6


def test_close_twice_is_no_error(metrics):
    metrics.close()


def test_missing_tensorboard_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("esam_dist.metrics.board.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"metrics.tensorboard = true.*pip install 'esam-dist\[tensorboard\]'"):
        build(tmp_path, tensorboard=True)
