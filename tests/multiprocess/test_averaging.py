"""The average of the weights on two real ranks, under every engine that holds whole weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esam_dist.averaging import WeightAverage, recompute_batchnorm
from esam_dist.models import Classifier
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment
from esam_dist.train import micro_batch
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import configuration, engine_of, make_batch, make_network, rank_batch
from tests.multiprocess.test_parity import ENGINES

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {"ema": {"decay": 0.9}, "lawa": {"last": 3, "every": 2}}
TRIED = [("native", "ema"), ("native", "lawa"), ("zero1", "lawa"), ("zero2", "ema")]


def images(rank: int) -> list[Tensor]:
    """Rank 1 holds more batches than rank 0."""
    return [make_batch(rank, 100 + step, 0, torch.float32)[0] for step in range(2 + rank)]


def trained(ranks: Ranks, engine_name: str, kind: str, averages: bool) -> dict[str, Any]:
    """What one rank has after some updates of which it kept the average, validated along the way, and saved once."""
    cfg = configuration({"name": "sam"}, engine=ENGINES[engine_name])
    classifier = Classifier(make_network(torch.float32), cfg.train.precision)
    engine = engine_of(classifier, cfg, ranks)
    trainer = SharpnessAware.over(engine, cfg.method, ranks)
    average, weights = WeightAverage(classifier, kind, **KINDS[kind]), []  # type: ignore[arg-type]
    for step in range(STEPS):
        batch = rank_batch(ranks, step, 0, torch.float32, cfg.data.batch_size)
        micro_batch(trainer, batch, cfg, Moment(step, float(step)), cfg.optim.lr)
        if averages:
            average.update(step + 1)
            with average.averaged(classifier):
                recompute_batchnorm(classifier, images(ranks.rank), ranks)
            if step == STEPS // 2:
                state = average.state_dict()
                average = WeightAverage(classifier, kind, **KINDS[kind])  # type: ignore[arg-type]
                average.load_state_dict(state)
        weights.append({name: param.detach().clone() for name, param in classifier.named_parameters()})
    result = {"state": engine.state_dict(), "weights": weights}
    with average.averaged(classifier):
        result["seen"] = recompute_batchnorm(classifier, images(ranks.rank), ranks)
        result["averaged"] = {name: value.detach().clone() for name, value in classifier.state_dict().items()}
    return result


def expected(kind: str, weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average in float64 by its definition, of the weights after every update."""
    average: dict[str, Tensor] = {}
    for name in weights[0]:
        values = [after[name].double() for after in weights]
        if kind == "lawa":
            average[name] = torch.stack(values[1::2][-3:]).mean(0)
            continue
        average[name] = values[0]
        for count, value in enumerate(values[1:], start=1):
            decay = min(0.9, (1 + count) / (10 + count))
            average[name] = decay * average[name] + (1 - decay) * value
    return average


@pytest.mark.parametrize(("engine", "kind"), TRIED)
def test_two_ranks_hold_the_same_average_to_the_bit_and_train_as_without_it(two_ranks: Cluster, engine, kind):
    first, second = two_ranks.run(trained, engine, kind, True)
    assert first["seen"] == second["seen"] == 5 * 6
    for name, value in first["averaged"].items():
        assert torch.equal(value, second["averaged"][name]), name
    for name, value in expected(kind, first["weights"]).items():
        torch.testing.assert_close(first["averaged"][name].double(), value, rtol=1e-6, atol=1e-6, msg=name)
        assert not torch.equal(first["averaged"][name], first["weights"][-1][name]), name
    (without, _) = two_ranks.run(trained, engine, kind, False)
    for name, value in without["state"]["model"].items():
        assert torch.equal(value, first["state"]["model"][name]), name
    for name, entry in without["state"]["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(value, first["state"]["optimizer"][name][key]), (name, key)


def test_statistics_over_ranks_are_those_of_one_process_with_all_batches(two_ranks: Cluster):
    first, second = two_ranks.run(recomputed)
    alone = recomputed(Ranks(), [*images(0), *images(1)])
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12, msg=name)


def recomputed(ranks: Ranks, batches: list[Tensor] | None = None) -> dict[str, Tensor]:
    network = make_network(torch.float64)
    own = images(ranks.rank) if batches is None else batches
    recompute_batchnorm(network, [batch.double() for batch in own], ranks)
    return {name: value.clone() for name, value in network.named_buffers() if value.is_floating_point()}
