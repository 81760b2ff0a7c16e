"""What an evaluation says of a network: against other libraries, by hand, and on any number of ranks."""

import json
import threading
import unicodedata
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from esam_dist import findings
from esam_dist.data import open_validation
from esam_dist.data.keys import DataKeys
from esam_dist.errors import UserError
from esam_dist.evaluate import evaluate
from esam_dist.evaluation import measures
from esam_dist.evaluation.classes import output_names, places
from esam_dist.evaluation.predictions import Predictions, predict
from esam_dist.evaluation.summary import summary
from esam_dist.findings import ClassScore, Findings
from esam_dist.ranks import Pending, Ranks

CPU = torch.device("cpu")


def given(shares_NK, labels_N):
    predicted = shares_NK.argmax(1)
    loss = -np.log(shares_NK[np.arange(len(labels_N)), labels_N])
    top5 = (np.argsort(-shares_NK, axis=1)[:, :5] == labels_N[:, None]).any(1)
    return Predictions(np.arange(len(labels_N)), labels_N, predicted, shares_NK.max(1), loss, top5)


@pytest.fixture(scope="module")
def random():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 6, 400)
    logits = draw.normal(size=(400, 7)) + 2.0 * np.eye(7)[labels]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return shares, labels, given(shares, labels)


def test_calibration_error_by_hand():
    # Two bins: 0.3 and 0.5 (an edge belongs below it), of which one is right; 0.6 and 0.8, of which both are.
    error, bins = measures.calibration(np.array([0.3, 0.8, 0.5, 0.6]), np.array([True, True, False, True]), 2)
    assert error == pytest.approx(0.5 * abs(0.5 - 0.4) + 0.5 * abs(1.0 - 0.7))
    assert [(b.low, b.high, b.count, b.accuracy) for b in bins] == [(0.0, 0.5, 2, 0.5), (0.5, 1.0, 2, 1.0)]
    assert [b.confidence for b in bins] == pytest.approx([0.4, 0.7])
    empty = measures.calibration(np.array([1.0]), np.array([True]), 3)
    assert empty[0] == 0.0
    assert [(b.count, b.confidence) for b in empty[1]] == [(0, None), (0, None), (1, 1.0)]


def test_calibration_error_is_that_of_torchmetrics(random):
    shares, labels, found = random
    theirs = multiclass_calibration_error(
        torch.tensor(shares), torch.tensor(labels), num_classes=7, n_bins=measures.BINS, norm="l1"
    )
    assert measures.calibration(found.confidence, found.is_right)[0] == pytest.approx(theirs.item(), abs=1e-6)


def test_classes_and_confusion_are_those_of_scikit_learn(random):
    _, labels, found = random
    matrix = np.zeros((7, 7), int)
    for true, predicted, count in measures.confusion(found):
        assert count > 0
        matrix[true, predicted] += count
    assert np.array_equal(matrix, confusion_matrix(labels, found.predicted, labels=range(7)))
    scores = measures.class_scores(found, [*"abcdefg"])
    recalls = recall_score(labels, found.predicted, labels=range(6), average=None)
    assert [score.accuracy for score in scores[:6]] == pytest.approx(recalls)
    assert scores[6] == ClassScore(name="g", count=0, accuracy=None)


def test_the_worst_mistakes_are_wrong_and_of_the_highest_loss(random):
    _, _, found = random
    chosen = measures.worst(found, 5)
    wrong = sorted(found.loss[found.predicted != found.labels], reverse=True)
    assert [found.loss[place] for place in chosen] == wrong[:5]
    assert measures.worst(found, 0) == []


class Brightness(nn.Module):
    """Ten logits that depend on the image, so that every sample has its own."""

    def forward(self, images):
        weights = torch.randn(images[0].numel(), 10, generator=torch.Generator().manual_seed(0))
        return images.flatten(1).double() @ weights.double() / 10


@dataclass(frozen=True)
class InThreads(Ranks):
    """Ranks that are threads of this process, and meet in a list."""

    meeting: tuple = ()

    def gather_later(self, tensor):
        places, barrier = self.meeting
        places[self.rank] = tensor
        barrier.wait(60)
        gathered = torch.stack(list(places))
        barrier.wait(60)
        return Pending(gathered, None)


def predicted_on(count, cfg):
    meeting, results = ([None] * count, threading.Barrier(count)), [None] * count

    def one(rank):
        data = open_validation(cfg, rank=rank, world_size=count, device=CPU)
        ranks = InThreads(rank, 0, count, CPU, meeting)
        results[rank] = predict(Brightness(), data, range(10), ranks)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("count", [2, 3, 24])
def test_every_rank_has_the_predictions_of_all_each_sample_once(few_digits, count):
    cfg = DataKeys(path=few_digits, batch_size=4, workers=0, image_size=16)
    (alone,) = predicted_on(1, cfg)
    assert alone.ids.tolist() == list(range(23))
    for found in predicted_on(count, cfg):
        assert np.array_equal(found.ids, alone.ids)
        assert np.array_equal(found.labels, alone.labels)
        assert np.array_equal(found.predicted, alone.predicted)
        assert np.allclose(found.loss, alone.loss, rtol=1e-12)


def test_predictions_belong_to_their_samples_also_where_one_is_left_out(copy):
    cfg = DataKeys(path=copy, batch_size=16, workers=0, image_size=16, max_skipped=1.0)
    whole = predict(Brightness(), open_validation(cfg, rank=0, world_size=1, device=CPU), range(10), Ranks())
    shard = next((copy / "validation").glob("*.tar"))
    data = open_validation(cfg, rank=0, world_size=1, device=CPU)
    content = bytearray(shard.read_bytes())
    content[int(data.split.entries["offset"][5]) + 20] ^= 0xFF
    shard.write_bytes(content)
    found = predict(Brightness(), data, range(10), Ranks())
    assert found.ids.tolist() == [number for number in range(359) if number != 5]
    kept = np.arange(359) != 5
    assert np.array_equal(found.labels, data.split.entries["label"][kept])
    assert np.array_equal(found.predicted, whole.predicted[kept])
    # What a training says of its validation is the same.
    score = evaluate(Brightness(), data, Ranks())
    assert score[:2] == (found.is_right.mean(), found.in_top5.mean())
    assert score.loss == pytest.approx(found.loss.mean(), rel=1e-6)


def test_outputs_that_are_not_finite_are_refused_with_a_remedy(few_digits):
    cfg = DataKeys(path=few_digits, batch_size=4, workers=0, image_size=16)
    data = open_validation(cfg, rank=0, world_size=1, device=CPU)

    class Lost(Brightness):
        def forward(self, images):
            return super().forward(images) * torch.nan

    with pytest.raises(UserError, match=r"not finite for 23 of 23 samples; evaluate with train.precision=fp32"):
        predict(Lost(), data, range(10), Ranks())


def test_classes_of_other_data_are_found_by_name_however_an_accent_is_written(tmp_path):
    run = ["zéro", "一", "two"]
    assert places(["two", unicodedata.normalize("NFD", "zéro")], run, tmp_path) == [2, 0]
    assert places(["same", "same"], ["same", "same"], tmp_path) == [0, 1]
    assert output_names(run, 4) == [*run, "output 3"]
    with pytest.raises(UserError, match="the run has no class 'drei', 'vier'; it knows 'zéro', '一', 'two': leave"):
        places(["two", "drei", "vier"], run, tmp_path)
    with pytest.raises(UserError, match="the run has two classes of the name 'a'"):
        places(["a"], ["a", "a", "b"], tmp_path)


def whole(shares, found, names):
    error, bins = measures.calibration(found.confidence, found.is_right)
    return Findings(
        checkpoint="step_1", averaged=False, data="data", num_samples=len(found), left_out=0,
        accuracy=found.is_right.mean(), top5_accuracy=found.in_top5.mean(), loss=found.loss.mean(),
        calibration_error=error, bins=bins, classes=measures.class_scores(found, names),
        confusion=measures.confusion(found), mistakes=[],
    )  # fmt: skip


def test_the_file_holds_what_was_found_and_others_are_refused(tmp_path, random):
    found = whole(*random[::2], [*"éb一defg"])
    path = tmp_path / "evaluation.json"
    findings.write(path, found)
    assert findings.read(path) == found
    values = json.loads(path.read_text())
    assert values["classes"][0]["name"] == "é"
    assert "é" in path.read_text(encoding="utf-8")
    values["accuracy"] = 2.0
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"is not what `esam-dist evaluate` writes \(accuracy: "):
        findings.read(path)
    with pytest.raises(UserError, match="No such file"):
        findings.read(tmp_path / "none")


def test_a_picture_is_nothing_but_a_picture():
    mistake = {"sample": "a", "true": 0, "predicted": 1, "confidence": 0.5, "loss": 1.0}
    findings.Mistake(**mistake, picture="data:image/png;base64,AAAA")
    for picture in ('data:image/png;base64,AAAA"onload="x', "http://host/x.png", "data:text/html;base64,AAAA"):
        with pytest.raises(ValueError, match="no data URI"):
            findings.Mistake(**mistake, picture=picture)


def test_the_summary_is_short_and_names_the_worst_and_the_best(random):
    found = whole(*random[::2], [f"class {letter}\n" for letter in "abcdefg"])
    many = [ClassScore(name=f"c{number}", count=100, accuracy=number / 100) for number in range(100)]
    found = replace_classes(found, many)
    lines = summary(found).splitlines()
    scores = f"accuracy {found.accuracy:.4f}, top-5 {found.top5_accuracy:.4f}, loss {found.loss:.4f}"
    assert lines[0] == f"step_1: {scores} over 400 samples"
    assert len(lines) < 12
    assert "c0: 0.000 of 100, c1: 0.010 of 100" in lines[2]
    assert "c99: 0.990 of 100, c98: 0.980 of 100" in lines[3]
    most = max((pair for pair in found.confusion if pair[0] != pair[1]), key=lambda pair: pair[2])
    assert lines[4].split()[:2] == ["most", "confused"]
    assert f"c{most[0]} as c{most[1]}: {most[2]} of 100" in lines[4]


def replace_classes(found, scores):
    return found.model_copy(update={"classes": scores})
