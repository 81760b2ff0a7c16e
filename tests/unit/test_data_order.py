"""The order is a contract: every claim of `esam_dist.data.order` as a property."""

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esam_dist.config import Config
from esam_dist.data.order import Order, mix, permutation, share
from esam_dist.progress import Progress
from esam_dist.train import final_step
from esam_dist.train_keys import TrainKeys

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**31 - 1)


def sequence(order: Order, start: int, count: int) -> list[int]:
    return order.picks(start, count).ids.tolist()


def steps(order: Order, samples_seen: int, num_steps: int, batch_size: int, world_size: int) -> list[int]:
    """What all ranks read together, step by step."""
    ranks = [
        order.batches(samples_seen, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [i for _ in range(num_steps) for rank in ranks for i in next(rank).ids.tolist()]


@given(SEEDS, st.integers(0, 1000), COUNTS, st.integers(1, 20))
def test_every_epoch_is_a_permutation(seed, epoch, counts, window):
    assert sorted(permutation(seed, epoch, counts, window)) == list(range(sum(counts)))


@given(SEEDS, COUNTS, st.integers(1, 5))
def test_samples_are_shuffled_only_within_a_window_of_shards(seed, counts, window):
    shard_of = np.repeat(np.arange(len(counts)), counts)[permutation(seed, 0, counts, window)]
    left = list(counts)
    for shard in shard_of:
        left[shard] -= 1
        unfinished = sum(0 < rest < count for rest, count in zip(left, counts, strict=True))
        assert unfinished <= window


@given(SEEDS, COUNTS, st.data())
def test_the_sequence_does_not_depend_on_where_it_is_entered(seed, counts, data):
    order = Order(seed, counts, window=3)
    length = 3 * order.num_samples
    whole = sequence(order, 0, length)
    start = data.draw(st.integers(0, length - 1))
    count = data.draw(st.integers(1, length - start))
    assert sequence(Order(seed, counts, window=3), start, count) == whole[start : start + count]


@given(SEEDS, COUNTS, st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 6)), max_size=5))
def test_changing_ranks_and_batch_size_mid_epoch_continues_the_same_sequence(seed, counts, phases):
    order, seen, read = Order(seed, counts, window=2), 0, []
    for world_size, batch_size, num_steps in phases:
        read += steps(order, seen, num_steps, batch_size, world_size)
        seen += num_steps * batch_size * world_size
    assert read == sequence(order, 0, seen)


@given(SEEDS, COUNTS, st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 300))
def test_to_the_end_of_training_all_ranks_take_the_same_number_of_full_batches_and_together_the_sequence(
    seed, counts, world_size, batch_size, epochs, samples_seen
):
    order, cfg = Order(seed, counts, window=2), Config(train=TrainKeys(epochs=epochs))
    taken = []
    for rank in range(world_size):
        # As the training loop has it: each rank counts for itself, and asks when the last step is only once.
        state = Progress(samples=samples_seen)
        last_step = final_step(cfg, state, order.num_samples, world_size * batch_size)
        batches = order.batches(samples_seen, batch_size=batch_size, rank=rank, world_size=world_size)
        taken.append([picks.ids.tolist() for picks in islice(batches, last_step)])
    assert len({len(batches) for batches in taken}) == 1
    assert all(len(batch) == batch_size for batches in taken for batch in batches)
    read = [i for step in zip(*taken, strict=True) for batch in step for i in batch]
    assert read == sequence(order, samples_seen, len(read))
    # The end is that of the last epoch, or less than a step behind it; every whole epoch shows every sample once.
    left = max(0, epochs * order.num_samples - samples_seen)
    assert left <= len(read) < left + world_size * batch_size
    N = order.num_samples
    for start in range(-samples_seen % N, len(read) - N + 1, N):
        assert sorted(read[start : start + N]) == list(range(N))


@given(st.integers(0, 500), st.integers(1, 40))
def test_validation_shares_cover_every_sample_once(num_samples, world_size):
    shares = [share(num_samples, rank, world_size) for rank in range(world_size)]
    assert [i for part in shares for i in part] == list(range(num_samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_and_seeds_differ():
    counts = [50, 50]
    orders = {tuple(permutation(seed, epoch, counts, 2)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_augmentation_seeds_belong_to_sample_and_epoch():
    order = Order(3, [10, 10], window=2)
    picks = order.picks(0, 60)
    seeds = {(int(e), int(i)): int(s) for e, i, s in zip(picks.epochs, picks.ids, picks.seeds, strict=True)}
    assert len(set(seeds.values())) == 60
    again = Order(3, [10, 10], window=1).picks(0, 60)
    assert seeds == {(int(e), int(i)): int(s) for e, i, s in zip(again.epochs, again.ids, again.seeds, strict=True)}


def test_the_order_is_the_same_for_ever():
    assert mix(0, 1, np.arange(2)).tolist() == [10705738211186751225, 12401259842959014280]
    assert permutation(0, 0, [3, 3, 3], 2).tolist() == [0, 7, 6, 8, 2, 1, 3, 5, 4]


@settings(max_examples=20)
@given(SEEDS)
def test_a_window_of_all_shards_is_as_good_as_a_perfect_shuffle(seed):
    # A uniform permutation of n has a mean displacement of about n / 3, with a standard deviation of about 0.2 sqrt(n).
    n = 4000
    ids = permutation(seed, 0, [500] * 8, 8)
    displacement = np.abs(ids - np.arange(n)).mean()
    assert abs(displacement - n / 3) < 6 * 0.31 * n / np.sqrt(n)
