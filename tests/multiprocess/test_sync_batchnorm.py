"""BatchNorm over all ranks, where each pass is a collective; by a stand-in, for torch has none for CPUs."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from esam_dist import config
from esam_dist.models import Classifier
from esam_dist.network import prepare_training
from esam_dist.ranks import Ranks
from esam_dist.sharpness_aware import SharpnessAware
from esam_dist.step import Moment
from esam_dist.train import micro_batch
from tests.multiprocess.cluster import Cluster
from tests.multiprocess.problem import BATCH, configuration, engine_of, make_network, rank_batch

WHOLE: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "sam": {"name": "sam"},
    "gsam": {"name": "gsam"},
    "asam": {"name": "asam"},
    "looksam": {"name": "looksam", "interval": 2},
    "msam": {"name": "msam"},
    "vasso": {"name": "vasso"},
    "fsam": {"name": "fsam"},
    "s2sam": {"name": "s2sam"},
    "esam": {"beta": 1.0},
    "esam_within_ranks": {"beta": 1.0, "scope": "rank", "score": "head"},
    "recycled": {"name": "recycled"},
    "groups": {"name": "sam", "group_size": 3},
}


class Synced(nn.BatchNorm2d):
    """Normalises by the batches of all ranks; each may have another number of samples, as where they are selected."""

    def forward(self, features: Tensor) -> Tensor:
        count = features.new_tensor(float(features.numel() // features.shape[1]))
        sums = torch.cat([features.sum((0, 2, 3)), features.square().sum((0, 2, 3)), count.view(1)])
        total = all_reduce(sums)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        shift, scale = self.bias - mean * self.weight * (square - mean.square() + self.eps).rsqrt(), self.weight
        factor = scale * (square - mean.square() + self.eps).rsqrt()
        return features * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def trained(ranks: Ranks, cfg: config.Config, *, synced: bool, dropout: float) -> tuple[str, dict[str, Tensor]]:
    network = make_network(torch.float64)
    network.dropout.p = dropout
    if synced:
        for place in (1, 4):
            network.body[place] = Synced(8).double()
    trainer = SharpnessAware.over(engine_of(Classifier(network), cfg, ranks), cfg.method, ranks)
    for step in range(3):
        batch = rank_batch(ranks, step, 0, torch.float64, cfg.data.batch_size)
        micro_batch(trainer, batch, cfg, Moment(step, float(step)), 0.1)
    state = {name: value for name, value in network.state_dict().items() if "running" not in name}
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest(), state


def in_pairs(ranks: Ranks, cfg: config.Config) -> tuple[str, dict[str, Tensor]]:
    return trained(ranks, cfg, synced=True, dropout=0.0)


def alone(ranks: Ranks, cfg: config.Config) -> tuple[str, dict[str, Tensor]]:
    return trained(Ranks(), cfg, synced=False, dropout=0.0)


def test_two_ranks_are_one_with_both_batches(two_ranks: Cluster) -> None:
    (digest, found), (other, _) = two_ranks.run(in_pairs, configuration(WHOLE["sgd"]))
    assert digest == other
    whole = two_ranks.run(alone, configuration(WHOLE["sgd"], data={"batch_size": 2 * BATCH}))[0][1]
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode in ("sam", "esam") else pytest.mark.slow) for mode in WHOLE]
)
def test_a_method_that_perturbs_all_weights_makes_alike_passes_on_all_ranks(two_ranks: Cluster, mode: str) -> None:
    # Else a rank would wait for ever; its replicas would not be alike.
    cfg = configuration(WHOLE[mode])
    assert "part" not in cfg.method.needs()
    first, second = two_ranks.run(in_pairs, cfg)
    assert first[0] == second[0]


def test_on_gpus_the_layers_are_torchs_but_for_those_that_are_frozen() -> None:
    from esam_dist.models.freeze import freeze

    cfg = configuration({"name": "sam"}, model={"sync_batchnorm": True})
    classifier = Classifier(make_network(torch.float32))
    freeze(classifier, ["body.0.*", "body.1.*"])
    weight = classifier.network.body[4].weight
    prepare_training(cfg, classifier, Ranks(0, 0, 2, torch.device("cuda")))
    kinds = [type(classifier.network.body[place]) for place in (1, 4)]
    assert kinds == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert classifier.network.body[4].weight is weight
    assert not classifier.train().network.body[1].training
