"""The average of the weights, against torch's own; in the weights' place, and away again to the bit."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

from esam_dist.averaging import WeightAverage, recompute_batchnorm, zero3_fault
from esam_dist.models import build_model
from esam_dist.ranks import Ranks

KINDS = {"ema": {"decay": 0.9}, "lawa": {"last": 3, "every": 2}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, x):
        return self.last(self.dropout(self.norm(self.first(x)))) + self.frozen


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def move(net, step):
    """Stands for an update: other weights, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for param in net.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator, dtype=param.dtype))
        net.norm.running_mean.add_(1.0)


def tensors(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def held(average, net):
    """The weights that `net` holds while averaged."""
    with average.averaged(net):
        return {name: param.detach().clone() for name, param in net.named_parameters()}


def assert_same(left, right):
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert value.dtype == right[name].dtype


def assert_near(left, right, tolerance):
    assert list(left) == list(right)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=tolerance, atol=tolerance, msg=name)


def warmed_up(decay):
    def average(averages, weights, count):
        get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averages, weights, count)

    return average


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
def test_ema_is_torchs_with_a_decay_that_grows(dtype, tolerance, decay):
    net = make_net(dtype)
    average = WeightAverage(net, "ema", decay=decay)
    # Up to 2 / 11 the decay does not grow: torch's own, as it is.
    reference = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay < 2 / 11 else warmed_up(decay))
    for step in range(1, 31):
        move(net, step)
        average.update(step)
        reference.update_parameters(net)
        assert_near(held(average, net), dict(reference.module.named_parameters()), tolerance)


def test_ema_forgets_the_first_weights_soon_however_slow_it_is():
    net = nn.Linear(1, 1, bias=False)
    average = WeightAverage(net, "ema", decay=0.9999)
    for step in range(1, 201):
        nn.init.constant_(net.weight, float(step))
        average.update(step)
    # The mean age is a tenth of the updates; the plain mean would be 100.
    assert held(average, net)["weight"].item() == pytest.approx(0.9 * 200, abs=2.0)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("last", [1, 2, 5])
def test_lawa_is_torchs_uniform_mean_of_the_latest_copies(last, every):
    # The single form: of the fused one the shares are of float32, whatever the weights are.
    net = make_net(torch.float64)
    average, copies = WeightAverage(net, "lawa", last=last, every=every), []
    for step in range(1, 20):
        move(net, step)
        average.update(step)
        if step % every == 0:
            copies.append(copy.deepcopy(net))
        if copies:
            reference = AveragedModel(net, avg_fn=get_swa_avg_fn())
            for taken in copies[-last:]:
                reference.update_parameters(taken)
            expected = dict(reference.module.named_parameters())
        else:
            expected = dict(net.named_parameters())
        assert_near(held(average, net), expected, 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_block_weights_and_statistics_are_what_they_were_to_the_bit(kind):
    net = make_net()
    average = WeightAverage(net, kind, **KINDS[kind])
    for step in range(1, 8):
        move(net, step)
        average.update(step)
    before, places = tensors(net), [tensor.data_ptr() for tensor in net.state_dict().values()]

    def spoil():
        with average.averaged(net):
            assert not torch.equal(net.first.weight, before["first.weight"])
            net.train()(torch.randn(5, 4))
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        spoil()
    assert_same(tensors(net), before)
    first = held(average, net)
    assert_same(tensors(net), before)
    assert_same(held(average, net), first)
    assert [tensor.data_ptr() for tensor in net.state_dict().values()] == places


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_copy_the_average_is_the_weights_themselves(kind):
    net = make_net()
    assert_same(held(WeightAverage(net, kind), net), {name: p.detach() for name, p in net.named_parameters()})


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_stay_and_tied_ones_count_once(kind):
    net = make_net()
    net.tied = net.first
    average = WeightAverage(net, kind, **KINDS[kind])
    for step in range(1, 8):
        move(net, step)
        average.update(step)
    assert torch.equal(held(average, net)["frozen"], net.frozen)
    for names in average.state_dict()["copies"]:
        assert list(names) == ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_are_averaged_in_float32(kind):
    net = make_net(torch.bfloat16)
    average = WeightAverage(net, kind, **KINDS[kind])
    for step in range(1, 8):
        move(net, step)
        average.update(step)
    assert average.state_dict()["copies"][0]["first.weight"].dtype == torch.float32
    assert held(average, net)["first.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_never_waits_for_the_device(kind):
    """Tensors without data cannot be waited for: asking for a value raises."""
    net = make_net().to("meta")
    average = WeightAverage(net, kind, **KINDS[kind])
    for step in range(1, 12):
        average.update(step)
    with average.averaged(net):
        pass


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [0, 1, 5, 12])
def test_saved_and_loaded_it_goes_on_to_the_bit(kind, ends):
    net = make_net().to(memory_format=torch.channels_last)
    average = WeightAverage(net, kind, **KINDS[kind])
    for step in range(1, ends + 1):
        move(net, step)
        average.update(step)
    saved = average.state_dict()
    state, again = through_a_file(saved), copy.deepcopy(net)
    other = WeightAverage(again, kind, **KINDS[kind])
    other.load_state_dict(state)
    for step in range(ends + 1, ends + 9):
        for network, kept in ((net, average), (again, other)):
            move(network, step)
            kept.update(step)
        assert_same(held(other, again), held(average, net))
    for names, loaded in zip(saved["copies"], state["copies"], strict=True):
        assert_same(names, loaded)


def test_of_more_copies_than_are_asked_for_the_newest_are_taken():
    net = make_net(torch.float64)
    many, few = WeightAverage(net, "lawa", last=5), WeightAverage(net, "lawa", last=2)
    for step in range(1, 6):
        move(net, step)
        many.update(step)
        few.update(step)
    loaded = WeightAverage(net, "lawa", last=2)
    loaded.load_state_dict(many.state_dict())
    assert_same(held(loaded, net), held(few, net))


def test_an_average_of_another_kind_or_none_begins_anew(caplog):
    net = make_net()
    lawa = WeightAverage(net, "lawa")
    move(net, 1)
    lawa.update(1)
    move(net, 2)
    for state, told in (({}, ""), (lawa.state_dict(), "average of kind lawa: ema begins anew")):
        caplog.clear()
        average = WeightAverage(net, "ema")
        average.load_state_dict(state)
        assert torch.equal(held(average, net)["first.weight"], net.first.weight)
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)


def draws(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, generator=generator, dtype=dtype) * (1 + number) for number, size in enumerate(sizes)]


def without_dropout(net):
    net.dropout.p = 0.0
    return net


def test_recomputed_statistics_are_torchs():
    net, batches = without_dropout(make_net(torch.float64)), draws([8, 8, 8])
    reference = copy.deepcopy(net)
    update_bn(batches, reference)
    assert recompute_batchnorm(net, batches, Ranks()) == 24
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(net.norm, name), getattr(reference.norm, name), rtol=1e-14, atol=1e-14)


def test_recomputed_statistics_are_torchs_for_a_network_of_many_batchnorms():
    torch.manual_seed(0)
    net = build_model("cifar_resnet8", 10).double()
    batches = list(torch.randn(4, 6, 3, 16, 16, dtype=torch.float64))
    reference = copy.deepcopy(net)
    update_bn(batches, reference)
    assert recompute_batchnorm(net, batches, Ranks()) == 24
    for (name, buffer), other in zip(net.named_buffers(), reference.buffers(), strict=True):
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, other, rtol=1e-13, atol=1e-13, msg=name)


def test_every_image_weighs_alike_in_batches_of_unequal_size():
    net, batches = make_net(torch.float64), draws([2, 10, 5])
    hidden = [net.first(batch).detach() for batch in batches]
    recompute_batchnorm(net, batches, Ranks())
    variance = sum(len(part) * part.var(0) for part in hidden) / 17
    torch.testing.assert_close(net.norm.running_mean, torch.cat(hidden).mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(net.norm.running_var, variance, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("fails", [False, True])
def test_recomputing_draws_nothing_and_leaves_modes_momenta_and_counts(fails):
    net = make_net(torch.float64).train()
    net.norm.momentum = None
    net.last.eval()
    modes, state = [child.training for child in net.modules()], torch.get_rng_state()
    batches = [*draws([4]), *([torch.zeros(4, 5)] if fails else [])]
    if fails:
        with pytest.raises(RuntimeError):
            recompute_batchnorm(net, batches, Ranks())
    else:
        recompute_batchnorm(net, batches, Ranks())
    assert [child.training for child in net.modules()] == modes
    assert net.norm.momentum is None
    assert net.norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_without_batchnorm_no_batch_is_taken_and_without_a_batch_nothing_changes():
    def never():
        raise AssertionError("taken")
        yield

    for net in (nn.Linear(4, 3), nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4)):
        assert recompute_batchnorm(net, never(), Ranks()) == 0
    net = make_net()
    before = tensors(net)
    assert recompute_batchnorm(net, [], Ranks()) == 0
    assert_same(tensors(net), before)


def test_a_batchnorm_that_no_pass_visits_keeps_its_statistics():
    net = make_net()
    net.aside = nn.BatchNorm1d(2)
    net.aside.running_mean.fill_(1 / 3)
    net.aside.running_var.fill_(1e-3)
    before = tensors(net.aside)
    recompute_batchnorm(net, draws([3, 7, 11], torch.float32), Ranks())
    assert_same(tensors(net.aside), before)


def test_within_the_block_statistics_fit_the_averaged_weights_and_the_raw_ones_come_back():
    net = without_dropout(make_net(torch.float64)).train()
    average = WeightAverage(net, "ema")
    for step in range(1, 5):
        move(net, step)
        average.update(step)
    before = tensors(net)
    with average.averaged(net):
        recompute_batchnorm(net, draws([50]), Ranks())
        normalised = net.norm.eval()(net.first(draws([50])[0])).std(0)
        torch.testing.assert_close(normalised, net.norm.weight.detach().abs(), rtol=1e-3, atol=1e-3)
        net.norm.train()
    assert_same(tensors(net), before)


@pytest.mark.parametrize("average", ["none", "ema", "lawa"])
@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_averaging_is_refused_under_zero_3_in_one_line(average, engine, stage):
    refused, words = zero3_fault(average, engine, stage)
    assert refused == (average != "none" and engine == "deepspeed" and stage == 3)
    assert f"train.average = {average}" in words
    assert "\n" not in words
