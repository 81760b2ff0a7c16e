"""Training through the command line: launchers, engines, continuing after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from esam_dist.checkpoint import read
from tests.commands import (
    TIMEOUT_SECONDS,
    alone,
    environment,
    free_port,
    here,
    on_ranks,
    rows,
    under_deepspeed,
    wait_for,
)

# A busy machine takes its time to import torch eight times.
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

# Names that dashboards and alerts rely on.
PROMETHEUS_NAMES = {
    *("esam_step", "esam_epoch", "esam_samples_total", "esam_kept_samples_total", "esam_train_loss"),
    *("esam_validation_accuracy", "esam_learning_rate", "esam_sharpness", "esam_gradient_norm"),
    *("esam_phase_seconds_bucket", "esam_phase_seconds_sum", "esam_phase_seconds_count"),
    *("esam_selection_threshold", "esam_skipped_perturbations_total", "esam_skipped_samples_total"),
    "esam_skipped_updates_total",
    *("esam_checkpoint_last_success_timestamp_seconds", "esam_last_step_timestamp_seconds"),
    *("esam_restarts_total", "esam_loss_not_finite_total", "esam_checkpoint_failures_total", "esam_run_info"),
}
TRAIN_KEYS = {
    *("kind", "step", "epoch", "loss", "lr", "grad_norm", "sharpness", "kept_fraction", "images_per_second"),
    *("step_seconds", "data_wait_seconds"),
}
# What a clock tells differs from run to run; all else must not.
CLOCK_KEYS = {"images_per_second", "step_seconds", "data_wait_seconds", "phases", "time", "seconds", "restarts"}
PHASES = {"data", "ascent", "score", "select", "descent", "update"}


@pytest.fixture(scope="module")
def native(tiny, tmp_path_factory):
    """20 steps on two ranks under torchrun, with the pages that the ranks' endpoints showed meanwhile."""
    folder, port, pages = tmp_path_factory.mktemp("native"), free_port(), {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "esam_dist", "train", str(tiny), f"run.folder={folder}", f"metrics.port={port}"]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
        while process.poll() is None:
            for rank in (0, 1):
                # Not there yet, or no more.
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/metrics") as answer:
                    pages[rank] = answer.read().decode()
            time.sleep(0.02)
        assert process.wait(TIMEOUT_SECONDS) == 0, (folder / "output").read_text()
    return folder, pages


@pytest.fixture(scope="module")
def zero1(tiny, tmp_path_factory):
    """The same under the deepspeed launcher with ZeRO 1."""
    folder = tmp_path_factory.mktemp("zero1")
    answer = under_deepspeed("train", tiny, f"run.folder={folder}", "engine.name=deepspeed", "engine.zero_stage=1")
    assert answer.status == 0, answer.err
    return folder


def repeatable(folder):
    """All rows without what a clock told."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in lines]


def curve(folder):
    return [row["loss"] for row in rows(folder)]


def interrupted(folder, copy, after=10):
    """A copy of the run as a kill some time after step `after` would have left it."""
    shutil.copytree(folder, copy)
    for checkpoint in sorted((copy / "checkpoints").iterdir()):
        if int(checkpoint.name.removeprefix("step_")) > after:
            shutil.rmtree(checkpoint)
    return copy


def assert_same(left, right):
    """Equal to the last bit, at whatever depth."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def final_state(folder):
    return read(folder / "checkpoints" / "step_00000020")


def test_torchrun_leaves_a_complete_run_folder(native):
    folder, _ = native
    names = {path.name for path in folder.iterdir()} - {"output"}
    assert names == {"config.yaml", "environment.json", "history.json", "metrics.jsonl", "checkpoints"}
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == [f"step_000000{step}" for step in ("05", "10", "15", "20")]


def test_rows_of_metrics_have_the_keys_that_readers_rely_on(native):
    train, validation = rows(native[0]), rows(native[0], "validation")
    assert [row["step"] for row in train] == list(range(1, 21))
    assert all(row.keys() >= TRAIN_KEYS for row in train)
    assert [row["step"] for row in validation] == [5, 10, 15, 20]
    assert all(row.keys() >= {"kind", "step", "epoch", "accuracy", "top5_accuracy", "loss"} for row in validation)
    # 23 samples: an accuracy that is no multiple of 1/23 counted one twice, or none.
    assert all((row["accuracy"] * 23) == pytest.approx(round(row["accuracy"] * 23)) for row in validation)
    assert all(0.0 <= row["accuracy"] <= row["top5_accuracy"] <= 1.0 for row in validation)


def test_schedules_reach_the_step(native):
    train = rows(native[0])
    assert [row["kept_fraction"] for row in train] == [1.0] * 5 + [0.5] * 15
    assert [row["beta"] for row in train[::5]] == [1.0, 0.75, 0.5, 0.5]
    assert [row["lr"] for row in train[:5]] == pytest.approx([0.05 * (step + 1) / 5 for step in range(5)])
    assert all(after["epoch"] - before["epoch"] == pytest.approx(0.2) for before, after in pairwise(train))


def test_every_phase_of_a_step_is_timed(native):
    assert set(rows(native[0])[-1]["phases"]) >= PHASES


def test_endpoints_of_both_ranks_show_every_promised_name_during_the_run(native):
    _, pages = native
    for rank in (0, 1):
        families = list(text_string_to_metric_families(pages[rank]))
        samples = [sample for family in families for sample in family.samples]
        # A counter by label has a family before it has a value.
        named = {sample.name for sample in samples} | {f"{family.name}_total" for family in families}
        assert named >= PROMETHEUS_NAMES
        values = {sample.name: sample.value for sample in samples}
        assert 5 <= values["esam_step"] <= 20
        # The step is told at once, the samples a moment later, with their row.
        assert 16 * values["esam_step"] - values["esam_samples_total"] in (0, 16)
        assert 0 < values["esam_kept_samples_total"] <= values["esam_samples_total"]
        phases = {sample.labels["phase"] for sample in samples if sample.name == "esam_phase_seconds_count"}
        assert phases == PHASES | {"checkpoint", "validate"}
        ranks = {sample.labels["rank"] for sample in samples if "rank" in sample.labels}
        assert ranks == {str(rank)}


def test_continued_after_a_kill_a_run_ends_as_if_nothing_had_been(native, tiny, tmp_path):
    copy = interrupted(native[0], tmp_path / "copy")
    answers = on_ranks("train", tiny, f"run.folder={copy}")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert "continuing from" in answers[0].err
    assert_same(final_state(copy)["engine"], final_state(native[0])["engine"])
    assert final_state(copy)["train"] == final_state(native[0])["train"]
    assert repeatable(copy) == repeatable(native[0])
    assert [row["restarts"] for row in rows(copy)] == [0] * 10 + [1] * 10


def test_the_deepspeed_launcher_gives_the_same_loss_curve(native, zero1):
    assert curve(zero1) == pytest.approx(curve(native[0]), rel=1e-5)
    assert [row["accuracy"] for row in rows(zero1, "validation")] == [
        row["accuracy"] for row in rows(native[0], "validation")
    ]


def test_zero1_continued_after_a_kill_ends_as_if_nothing_had_been(zero1, tiny, tmp_path):
    copy = interrupted(zero1, tmp_path / "copy")
    answers = on_ranks("train", tiny, f"run.folder={copy}", "engine.name=deepspeed", "engine.zero_stage=1")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert_same(final_state(copy)["engine"], final_state(zero1)["engine"])
    assert repeatable(copy) == repeatable(zero1)


@pytest.mark.slow
def test_zero2_gives_the_same_curve_and_continues_to_the_bit(native, tiny, tmp_path):
    engine = ("engine.name=deepspeed", "engine.zero_stage=2")
    answers = on_ranks("train", tiny, f"run.folder={tmp_path / 'zero2'}", *engine)
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert curve(tmp_path / "zero2") == pytest.approx(curve(native[0]), rel=1e-5)
    copy = interrupted(tmp_path / "zero2", tmp_path / "copy")
    answers = on_ranks("train", tiny, f"run.folder={copy}", *engine)
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert_same(final_state(copy)["engine"], final_state(tmp_path / "zero2")["engine"])
    assert repeatable(copy) == repeatable(tmp_path / "zero2")


def test_a_checkpoint_of_the_native_engine_continues_under_deepspeed(native, tiny, tmp_path):
    copy = interrupted(native[0], tmp_path / "copy")
    answers = on_ranks("train", tiny, f"run.folder={copy}", "engine.name=deepspeed", "engine.zero_stage=2")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert curve(copy) == pytest.approx(curve(native[0]), rel=1e-5)


def test_a_checkpoint_of_deepspeed_continues_under_the_native_engine(zero1, tiny, tmp_path):
    copy = interrupted(zero1, tmp_path / "copy")
    answers = on_ranks("train", tiny, f"run.folder={copy}", "engine.name=native")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert curve(copy) == pytest.approx(curve(zero1), rel=1e-5)


def test_another_number_of_ranks_goes_on_at_the_same_sample(native, tiny, tmp_path):
    copy = interrupted(native[0], tmp_path / "copy")
    assert here("train", tiny, f"run.folder={copy}").status == 0
    # One rank with batches of 8: twice the steps for the two epochs that were left.
    assert [row["step"] for row in rows(copy)] == list(range(1, 31))
    assert read(copy / "checkpoints" / "step_00000030")["train"]["samples_seen"] == 320


def test_alone_a_process_of_its_own_trains_and_is_scored_again(tiny, tmp_path):
    answer = alone("train", tiny, f"run.folder={tmp_path}", "train.epochs=1")
    assert answer.status == 0, answer.err
    last = rows(tmp_path, "validation")[-1]
    answer = here("evaluate", tmp_path, "--checkpoint", "newest")
    assert f"accuracy {last['accuracy']:.4f}" in answer.out
    assert "over 23 samples" in answer.out


def test_a_finished_run_says_so_and_stays_as_it_is(tiny, tmp_path, caplog):
    arguments = ("train", tiny, f"run.folder={tmp_path}", "train.max_steps=2")
    with caplog.at_level("INFO"):
        assert [here(*arguments).status, here(*arguments).status] == [0, 0]
    assert "nothing is left to do" in caplog.text
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_sigterm_to_one_rank_stops_all_after_a_checkpoint(tiny, tmp_path):
    metrics = tmp_path / "metrics.jsonl"

    def stop_the_second(pids):
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
        os.kill(pids[1], signal.SIGTERM)

    long = ("train.epochs=10000", "train.validate_every=10000", "checkpoint.every_steps=100000")
    answers = on_ranks("train", tiny, f"run.folder={tmp_path}", *long, meanwhile=stop_the_second)
    assert [answer.status for answer in answers] == [143, 143], answers[0].err
    last = rows(tmp_path)[-1]["step"]
    assert [path.name for path in Path(tmp_path / "checkpoints").iterdir()] == [f"step_{last:08d}"]
    # The next start goes on from there.
    answers = on_ranks("train", tiny, f"run.folder={tmp_path}", *long, f"train.max_steps={last + 2}")
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, last + 3))


def test_epochs_to_validate_are_not_missed_by_updates_that_span_more_than_one(tiny, tmp_path):
    # 128 samples an update, of 80 in the set: they end in epochs 1.6, 3.2, 4.8 and 6.4.
    keys = ("data.batch_size=16", "train.accumulate=8", "train.epochs=6", "train.validate_every=3")
    assert here("train", tiny, f"run.folder={tmp_path}", *keys).status == 0
    assert [row["step"] for row in rows(tmp_path, "validation")] == [2, 4]
