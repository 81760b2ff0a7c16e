"""An average of the weights beside any method: validated, saved, continued and evaluated by the command line."""

from __future__ import annotations

import re

import pytest
import torch

from tests.commands import here, on_ranks, rows

LAWA = ("train.average=lawa", "train.average_last=2", "train.average_every=5")


def state_of(folder, step):
    return torch.load(folder / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)


@pytest.mark.parametrize("average", [("train.average=ema", "train.average_decay=0.9"), LAWA], ids=["ema", "lawa"])
def test_it_is_validated_beside_the_weights_and_evaluated_again_alike(tiny, tmp_path, average):
    assert here("train", tiny, f"run.folder={tmp_path}", "method.name=msam", *average).status == 0
    seen = rows(tmp_path, "validation")
    assert len(seen) == 4
    assert all(0.0 <= row["averaged_accuracy"] <= 1.0 and row["averaged_loss"] > 0.0 for row in seen)
    answer = here("evaluate", tmp_path, "--averaged", "--checkpoint", "newest")
    assert answer.status == 0, answer.err
    accuracy, loss = re.search(r"accuracy ([\d.]+).*loss ([\d.]+)", answer.out).groups()
    assert float(accuracy) == pytest.approx(seen[-1]["averaged_accuracy"], abs=5e-5)
    assert float(loss) == pytest.approx(seen[-1]["averaged_loss"], abs=1e-4)
    raw = here("evaluate", tmp_path, "--checkpoint", "newest")
    assert float(re.search(r"loss ([\d.]+)", raw.out)[1]) == pytest.approx(seen[-1]["loss"], abs=1e-4)
    assert seen[-1]["loss"] != pytest.approx(seen[-1]["averaged_loss"], abs=1e-4)


def test_training_and_its_weights_are_what_they_are_without_it(tiny, tmp_path):
    for name, words in (("with", LAWA), ("without", ())):
        assert here("train", tiny, f"run.folder={tmp_path / name}", "train.epochs=2", *words).status == 0
    left, right = (state_of(tmp_path / name, 20)["engine"] for name in ("with", "without"))
    assert all(torch.equal(value, right["model"][key]) for key, value in left["model"].items())
    assert [row["loss"] for row in rows(tmp_path / "with")] == [row["loss"] for row in rows(tmp_path / "without")]


def test_a_run_on_two_ranks_that_stops_goes_on_with_its_average_to_the_bit(tiny, tmp_path):
    words = ("train.average=ema", "train.epochs=2")
    for folder, stops in (("whole", [()]), ("halves", [("train.max_steps=5",), ()])):
        for stop in stops:
            for answer in on_ranks("train", tiny, f"run.folder={tmp_path / folder}", *words, *stop):
                assert answer.status == 0, answer.err
    whole, halves = (state_of(tmp_path / name, 10)["average"] for name in ("whole", "halves"))
    assert whole["updates"] == halves["updates"] == 10
    for name, value in whole["copies"][0].items():
        assert torch.equal(value, halves["copies"][0][name]), name
    for name, value in whole["statistics"].items():
        assert torch.equal(value, halves["statistics"][name]), name


def test_evaluating_an_average_that_was_not_kept_is_one_line(tiny, tmp_path):
    assert here("train", tiny, f"run.folder={tmp_path}", "train.max_steps=2").status == 0
    answer = here("evaluate", tmp_path, "--averaged", "--checkpoint", "newest")
    assert answer.status == 2
    assert "train.average = ema" in answer.err
    assert answer.err.count("\n") == 1
