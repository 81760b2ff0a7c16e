"""`data.sampling: balanced`: every class equally often, and all that the order promises."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esam_dist.config import parse
from esam_dist.data import open_train
from esam_dist.data.balance import Balanced, draw
from esam_dist.data.keys import DataKeys
from esam_dist.data.order import Order, mix
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.errors import UserError
from tests.prepared import Noise

# Classes of very uneven sizes, numbered with gaps, in any order.
LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(np.array)
SEEDS = st.integers(0, 2**31 - 1)


def balanced(seed: int, labels: np.ndarray, *, shards: int = 1, window: int = 2, repeats: int = 1) -> Balanced:
    counts = [len(part) for part in np.array_split(labels, min(shards, len(labels)))]
    return Balanced(seed, counts, window, repeats, labels)


@given(SEEDS, LABELS, st.integers(0, 50))
def test_an_epoch_has_as_many_draws_as_samples_and_classes_differ_by_one_at_most(seed, labels, epoch):
    ids = draw(seed, epoch, labels).ids
    assert len(ids) == len(labels)
    counts = Counter(labels[ids].tolist())
    fair = len(labels) // len(set(labels.tolist()))
    assert all(fair <= counts[label] <= fair + 1 for label in set(labels.tolist()))


@given(SEEDS, LABELS, st.integers(1, 6))
def test_over_all_epochs_classes_and_samples_of_a_class_differ_by_one_at_most(seed, labels, epochs):
    drawn = np.concatenate([draw(seed, epoch, labels).ids for epoch in range(epochs)])
    of_sample = np.bincount(drawn, minlength=len(labels))
    of_class = [of_sample[labels == label] for label in set(labels.tolist())]
    assert all(np.ptp(counts) <= 1 for counts in of_class)
    assert np.ptp([counts.sum() for counts in of_class]) <= 1


@settings(max_examples=40)
@given(SEEDS, LABELS, st.integers(1, 4), st.data())
def test_the_sequence_depends_on_seed_epoch_and_position_only(seed, labels, shards, data):
    order = balanced(seed, labels, shards=shards)
    whole = order.picks(0, 3 * len(labels))
    ranks, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    start = data.draw(st.integers(0, 2 * len(labels)))
    again = balanced(seed, labels, shards=shards)
    read = [next(again.batches(start, batch_size=size, rank=rank, world_size=ranks)) for rank in range(ranks)]
    ids = np.concatenate([picks.ids for picks in read])
    views = np.concatenate([picks.seeds for picks in read])
    room = len(whole.ids) - start
    assert ids[:room].tolist() == whole.ids[start : start + len(ids)].tolist()
    assert views[:room].tolist() == whole.seeds[start : start + len(ids)].tolist()


@given(SEEDS, LABELS, st.integers(1, 3))
def test_no_two_views_of_a_sample_are_augmented_alike(seed, labels, repeats):
    picks = balanced(seed, labels, repeats=repeats).picks(0, 3 * len(labels) * repeats)
    assert len(set(picks.seeds.tolist())) == len(picks.seeds)


def test_draws_are_shuffled_and_stay_within_their_window_of_shards():
    labels = np.repeat([0, 1], [30, 90])
    order = Balanced(0, [40, 40, 40], 1, 1, labels)
    ids = order.draw(0).ids
    changes = np.flatnonzero(np.diff(ids // 40))
    assert len(changes) == 2
    assert len(set(np.diff(ids).tolist())) > 20


def test_where_all_classes_are_of_one_size_every_sample_comes_once_in_an_epoch():
    labels = np.arange(60) % 4
    for epoch in range(3):
        assert sorted(draw(5, epoch, labels).ids.tolist()) == list(range(60))


def test_uniform_sampling_draws_what_it_always_drew():
    picks = Order(3, [10, 10], 2, repeats=2).picks(7, 50)
    positions, repeat = np.divmod(np.arange(7, 57), 2)
    assert picks.seeds.tolist() == mix(3, 3, positions // 20, picks.ids, repeat).tolist()


class Uneven(Noise):
    """Of 60 pictures 45 are of one class."""

    def __init__(self):
        super().__init__()
        self.labels["train"] = [0] * 45 + [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loader_hands_out_balanced_batches_to_any_number_of_ranks(tmp_path, world_size):
    write_dataset(Uneven(), tmp_path, Plan(samples_per_shard=25))
    cfg = DataKeys(path=tmp_path, batch_size=12 // world_size, workers=0, sampling="balanced", augment="none")
    labels = []
    for rank in range(world_size):
        data = open_train(cfg, seed=0, rank=rank, world_size=world_size, device=torch.device("cpu"))
        batches = data.batches(0)
        labels += [next(batches).labels for _ in range(5)]
        data.close()
    assert torch.bincount(torch.cat(labels)).tolist() == [15, 15, 15, 15]


def test_a_stream_cannot_be_balanced():
    with pytest.raises(UserError, match=r"data\.sampling = balanced: the classes of data\.stream"):
        parse({"data": {"sampling": "balanced", "stream": "https://host/{00..11}.tar", "stream_samples": 9}}, "given")
