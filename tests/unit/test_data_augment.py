"""Augmentation is a function of the sample's seed, and does what its name says."""

import json
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esam_dist.data import Batch, open_train, open_validation
from esam_dist.data.augment import random_box, shift
from esam_dist.data.keys import DataKeys
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.models import build_model
from tests.commands import here
from tests.prepared import Noise
from tests.steps import digits_batch, sharp, step

CPU = torch.device("cpu")
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "noise"
    write_dataset(Noise(), out, Plan(samples_per_shard=16))
    return out


def batches(root: Path, start: int, count: int, rank=0, world_size=1, **values):
    cfg = DataKeys(**{"path": root, "batch_size": 12, "workers": 0, "image_size": 24, **values})
    data = open_train(cfg, seed=5, rank=rank, world_size=world_size, device=CPU)
    return list(islice(data.batches(start), count))


RECIPES = {
    "imagenet": {"augment": "imagenet"},
    "randaugment": {"augment": "imagenet", "policy": "randaugment", "magnitude": 15},
    "trivialaugment": {"augment": "imagenet", "policy": "trivialaugment"},
    "jitter": {"augment": "none", "color_jitter": 0.4},
    "erase": {"augment": "none", "erase": 0.9},
    "all": {"augment": "imagenet", "policy": "trivialaugment", "color_jitter": 0.3, "erase": 0.3, "flip": True},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sample_is_augmented_alike_on_whatever_rank_and_worker(root, recipe):
    one = batches(root, 60, 1, batch_size=24, **RECIPES[recipe])[0]
    two = [batches(root, 60, 1, rank=r, world_size=2, workers=r, **RECIPES[recipe])[0] for r in range(2)]
    assert torch.equal(one.images, torch.cat([batch.images for batch in two]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_augmentation_leaves_the_random_state_alone_and_changes_the_image(root, recipe):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    changed = batches(root, 0, 1, **RECIPES[recipe])[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = batches(root, 0, 1, augment="none")[0]
    assert torch.equal(changed.labels, plain.labels)
    assert (changed.images != plain.images).flatten(1).any(1).float().mean() > 0.5


def test_erasing_shows_the_mean_colour(root):
    images = batches(root, 0, 1, augment="none", erase=1.0)[0].images
    assert ((images.abs() < 0.02).all(1).flatten(1).sum(1) >= 5).all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_random_boxes_lie_in_the_image(width, height, seed):
    box = random_box(width, height, Random(seed))
    assert box.left >= 0
    assert box.top >= 0
    assert box.width >= 1
    assert box.height >= 1
    assert box.left + box.width <= width
    assert box.top + box.height <= height


def test_random_boxes_have_the_areas_and_shapes_of_the_recipe():
    boxes = [random_box(500, 400, Random(seed)) for seed in range(4000)]
    areas = np.array([box.width * box.height for box in boxes]) / 200_000
    shapes = np.array([box.width / box.height for box in boxes])
    assert areas.min() > 0.07
    assert 0.45 < areas.mean() < 0.54
    assert shapes.min() > 0.73
    assert shapes.max() < 1.36


def test_shift_moves_by_up_to_an_eighth_and_fills_with_black():
    moves = set()
    for seed in range(300):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[16, 16] = 255
        shift(pixels, Random(seed))
        ((y, x),) = np.argwhere(pixels[..., 0])
        moves.add((y - 16, x - 16))
    assert {y for y, _ in moves} == {x for _, x in moves} == set(range(-4, 5))


@pytest.mark.parametrize("recipe", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_labels_are_soft_sum_to_one_and_fit_the_images(root, recipe):
    values = {"augment": "none", **PLAIN, **recipe}
    plain = batches(root, 0, 3, augment="none", **PLAIN)
    mixed = batches(root, 0, 3, **values)
    again = batches(root, 24, 1, **values)[0]
    assert torch.equal(mixed[2].images, again.images)
    assert torch.equal(mixed[2].labels, again.labels)
    for before, after in zip(plain, mixed, strict=True):
        assert after.labels.shape == (12, 4)
        assert torch.allclose(after.labels.sum(1), torch.ones(12))
        own = torch.nn.functional.one_hot(before.labels, 4).float()
        partner = own.roll(1, 0)
        different = (own != partner).any(1)
        share = (after.labels * own).sum(1)[different][0]
        assert torch.allclose(after.labels, share * own + (1 - share) * partner, atol=1e-5)
        if "cutmix" not in recipe:
            blended = share * before.images + (1 - share) * before.images.roll(1, 0)
            assert torch.allclose(after.images, blended, atol=1e-5)


@pytest.mark.parametrize("mixed", [{"mixup": 0.4}, {"cutmix": 1.0}])
@pytest.mark.parametrize(
    "method",
    [
        *(
            {"score": score, "scope": scope}
            for score in ("forward", "head", "loss", "random")
            for scope in ("rank", "global")
        ),
        {"score": "forward", "scope": "rank", "group_size": 4},
        {"name": "recycled", "score": "random", "scope": "rank", "exact": True},
        {"transport": "thresholds"},
        *({"name": name} for name in ("sgd", "sam", "gsam")),
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_soft_labels_go_through_every_step_to_a_checkpoint(tiny, tmp_path, mixed, method):
    changes = [f"data.{key}={value}" for key, value in mixed.items()]
    keeps_half = method.get("name", "recycled") == "recycled"
    changes += [f"method.{key}={value}" for key, value in (({"gamma": 0.5} if keeps_half else {}) | method).items()]
    answer = here("train", tiny, f"run.folder={tmp_path}", *changes, "train.max_steps=3", "train.label_smoothing=0.1")
    assert answer.status == 0, answer.err
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert all(1.0 < loss < 4.0 for loss in losses)
    share = 0.5 if keeps_half else 1.0
    assert [row["kept_fraction"] for row in rows if row["kind"] == "train"] == [share] * 3


@pytest.mark.parametrize("score", ["forward", "head", "loss", "random"])
def test_soft_labels_that_are_certain_train_like_hard_ones(score):
    images, labels = digits_batch(dtype=torch.float64)
    method = sharp(gamma=0.5, score=score)
    results = []
    for shares in (labels, torch.nn.functional.one_hot(labels, 10).double()):
        torch.manual_seed(0)
        network = build_model("cifar_resnet8", 10).double()
        stats = step(network, Batch(images, shares), method)
        results.append([*(value.detach() for value in network.state_dict().values()), *stats[:4]])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_repeats_show_each_sample_several_times_augmented_anew(root):
    batch = batches(root, 0, 1, augment="imagenet", repeats=3)[0]
    labels = batch.labels.view(4, 3)
    assert (labels == labels[:, :1]).all()
    assert all(not torch.equal(batch.images[i], batch.images[i + 1]) for i in range(11))
    plain = batches(root, 0, 15, augment="none", repeats=3, **PLAIN)
    seen = torch.cat([batch.images for batch in plain]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == 60


def test_progressive_sizes_begin_with_their_epoch_on_all_ranks(root):
    schedule = {"progressive": [[0, 16], [2, 32]], "augment": "imagenet"}
    for rank in range(2):
        sizes = [b.images.shape[-1] for b in batches(root, 0, 7, rank=rank, world_size=2, **schedule)]
        assert sizes == [16, 16, 16, 16, 16, 32, 32]
    cfg = DataKeys(path=root, image_size=24, workers=0, **schedule)
    data = open_validation(cfg, rank=0, world_size=1, device=CPU)
    assert next(iter(data.batches())).images.shape[-1] == 24


def test_crop_ratio_shows_the_centre(root):
    def first(ratio):
        cfg = DataKeys(path=root, image_size=40, crop_ratio=ratio, workers=0)
        return next(iter(open_validation(cfg, rank=0, world_size=1, device=CPU).batches())).images

    inner = first(1.0)[:, :, 10:30, 10:30]
    assert (first(0.5)[:, :, ::2, ::2] - inner).abs().mean() < 0.2
    assert (first(1.0)[:, :, ::2, ::2] - inner).abs().mean() > 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.4, "cutmix": 1.0}])
def test_batches_copied_beside_a_busy_gpu_are_those_of_the_cpu(root, workers, mixed):
    cfg = DataKeys(
        **{"path": root, "batch_size": 12, "workers": workers, "image_size": 24, "augment": "imagenet"} | mixed
    )
    expected = batches(root, 0, 30, augment="imagenet", **mixed)
    device = torch.device("cuda", torch.cuda.current_device())
    data = open_train(cfg, seed=5, rank=0, world_size=1, device=device)
    seen = []
    for batch in islice(data.batches(0), 30):
        # The host runs ahead of the device, which is slow to use this batch: its memory must be left to it meanwhile.
        torch.cuda._sleep(5_000_000)
        assert batch.images.device == batch.labels.device == device
        seen.append([(tensor * 1).to("cpu", non_blocking=True) for tensor in batch])
        del batch
    torch.cuda.synchronize()
    for (images, labels), one in zip(seen, expected, strict=True):
        torch.testing.assert_close(images, one.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(labels, one.labels)
