"""Measures of sharpness against a quadratic of known spectrum, and against the full Hessian of a tiny network."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from esam_dist.cli import main
from esam_dist.data import Batch
from esam_dist.ranks import Ranks
from esam_dist.sharpness import Objective, hessian, landscape, perturbed
from esam_dist.sharpness.measure import Wanted, measure

SPECTRUM = [9.0, 4.0, 1.0, 0.5, -2.0, 0.0]


class Quadratic(Objective):
    """`w'Aw / 2`, where A has the eigenvalues `SPECTRUM`."""

    def __init__(self):
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
        self.matrix = basis @ torch.diag(torch.tensor(SPECTRUM, dtype=torch.float64)) @ basis.T
        module = nn.Module()
        module.w = nn.Parameter(torch.randn(6, dtype=torch.float64))
        super().__init__(module, [Batch(torch.zeros(1), torch.zeros(1))], Ranks())

    def losses(self, batch):
        return (0.5 * self.module.w @ self.matrix @ self.module.w).unsqueeze(0)


def small(seed=0, *, batch_norm=True):
    """A network of 3 by 2 by 3 with BatchNorm, and 24 samples in unequal batches."""
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(4)] if batch_norm else []
    module = nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).double()
    images, labels = torch.randn(24, 3, dtype=torch.float64), torch.randint(3, (24,))
    module(images)  # moves the running statistics off their first values
    batches = [Batch(images[a:b], labels[a:b]) for a, b in ((0, 10), (10, 20), (20, 24))]
    return Objective(module, batches, Ranks()), images, labels


def full_hessian(objective, images, labels):
    names = [name for name, _ in objective.module.named_parameters()]
    shapes = [param.shape for param in objective.params]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(objective.module, values, images)
        return nn.functional.cross_entropy(logits, labels)

    at = torch.cat([param.detach().flatten() for param in objective.params])
    return torch.autograd.functional.hessian(loss, at)


def test_largest_eigenvalues_of_a_quadratic_are_those_it_was_made_with():
    assert hessian.largest_eigenvalues(Quadratic(), 4, tolerance=1e-10) == pytest.approx([9, 4, 1, 0.5], rel=1e-9)


def test_trace_of_a_quadratic_lies_within_its_error():
    found = hessian.trace(Quadratic(), 1000)
    assert 0.0 < found.error < 0.4
    assert abs(found.mean - sum(SPECTRUM)) < 4 * found.error


def test_eigenvalues_and_products_are_those_of_the_full_hessian():
    objective, images, labels = small()
    whole = full_hessian(objective, images, labels)
    expected = torch.linalg.eigvalsh(whole).flip(0)[:5].tolist()
    assert hessian.largest_eigenvalues(objective, 5, tolerance=1e-12) == pytest.approx(expected, rel=1e-9)
    direction = [torch.randn_like(param) for param in objective.params]
    product = torch.cat([part.flatten() for part in objective.product(direction)])
    torch.testing.assert_close(product, whole @ torch.cat([part.flatten() for part in direction]))


def test_second_derivatives_go_through_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    objective = Objective(module, [Batch(torch.randn(4, 3, 8), torch.tensor([0, 1, 2, 0]))], Ranks())
    assert math.isfinite(hessian.trace(objective, 2).mean)


def test_worst_case_is_the_rise_along_each_groups_own_gradient():
    objective, images, labels = small()
    found = perturbed.worst_case(objective, [0.1, 0.3], 8)
    for rho, estimate in zip((0.1, 0.3), found, strict=True):
        rises = []
        for start in range(0, 24, 8):
            part = images[start : start + 8], labels[start : start + 8]
            module = objective.module
            before = nn.functional.cross_entropy(module(part[0]), part[1])
            slopes = torch.autograd.grad(before, objective.params)
            length = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
            moved = {
                name: param + rho * slope / length
                for (name, param), slope in zip(module.named_parameters(), slopes, strict=True)
            }
            after = nn.functional.cross_entropy(torch.func.functional_call(module, moved, part[0]), part[1])
            rises.append((after - before).item())
        assert estimate.mean == pytest.approx(np.mean(rises), rel=1e-12)
        assert estimate.error == pytest.approx(np.std(rises, ddof=1) / math.sqrt(3), rel=1e-9)


def test_average_rise_of_a_quadratic_follows_its_trace():
    objective = Quadratic()
    with torch.no_grad():
        objective.module.w.zero_()
    rho = 0.3
    (found,) = perturbed.average_case(objective, [rho], 4000)
    assert abs(found.mean - rho**2 * sum(SPECTRUM) / (2 * 6)) < 4 * found.error


def test_adaptive_worst_case_does_not_change_when_layers_are_rescaled():
    plain, _, _ = small(batch_norm=False)
    scaled, _, _ = small(batch_norm=False)
    for objective in (plain, scaled):
        objective.module[1] = nn.ReLU()
    with torch.no_grad():
        scaled.module[0].weight.mul_(10)
        scaled.module[0].bias.mul_(10)
        scaled.module[2].weight.div_(10)
    assert scaled.loss() == pytest.approx(plain.loss(), rel=1e-12)
    by_m = [[perturbed.worst_case(o, [0.2], 8, adaptive=a)[0].mean for o in (plain, scaled)] for a in (True, False)]
    assert by_m[0][1] == pytest.approx(by_m[0][0], rel=1e-9)
    assert abs(by_m[1][1] / by_m[1][0] - 1) > 0.1


def test_filters_of_a_direction_have_the_norms_of_the_networks_and_vectors_stay():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    objective = Objective(module, [Batch(torch.randn(2, 3, 3, 3), torch.tensor([0, 1]))], Ranks())
    weight, bias, matrix, _ = landscape.filter_normalised(objective, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), module[0].weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(matrix.norm(dim=1), module[2].weight.norm(dim=1))
    assert not bias.any()


def test_landscape_has_the_loss_in_its_middle_and_weights_stay_to_the_bit():
    objective, _, _ = small()
    before = [param.detach().clone() for param in objective.params]
    found = measure(objective, Wanted(eigenvalues=2, probes=2, group_sizes=[4, 8], line=5, plane=3))
    assert found["line"]["loss"][2] == found["plane"]["loss"][1][1] == found["loss"] == objective.loss()
    assert found["line"]["place"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert set(found["m_sharpness"]) == {"4", "8"}
    assert all(torch.equal(param, kept) for param, kept in zip(objective.params, before, strict=True))
    json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharpness") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny), f"run.folder={folder}", "train.epochs=1"])
    assert ended.value.code == 0
    return folder


def measured(folder, *options):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "sharpness",
                str(folder),
                "--samples",
                "60",
                "--rho",
                "0.05",
                "--group-size",
                "10",
                "--line",
                "3",
                *options,
            ]
        )
    return ended.value.code


def test_command_measures_a_checkpoint_and_writes_json_and_a_page(trained, capsys):
    assert measured(trained, "--plane", "3", "--eigenvalues", "1", "--probes", "2", "--draws", "2") == 0
    found = json.loads((trained / "sharpness.json").read_text())
    assert found["samples"] == 60
    assert found["split"] == "train"
    assert found["eigenvalues"][0] > 0
    assert "10-sharpness, rho 0.05" in capsys.readouterr().out
    assert "Loss on a plane" in (trained / "sharpness.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--probes", "1"], "--probes"),
        (["--group-size", "0"], "--group-size 0"),
        (["--group-size", "64", "--eigenvalues", "0", "--probes", "0"], "--group-size 64"),
        (["--averaged"], "no average"),
        (["--out", "/dev/null/page.html", "--eigenvalues", "0", "--probes", "0", "--draws", "0"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line(trained, capsys, options, words):
    assert measured(trained, *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(trained):
    options = ["--samples", "60", "--rho", "0.05", "--group-size", "10", "--line", "3", "--probes", "2", "--draws", "2"]
    command = [sys.executable, "-m", "esam_dist", "sharpness", str(trained), *options]
    results = []
    for launcher in ([], ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]):
        started = [sys.executable, "-m", *launcher, *command[2:]]
        subprocess.run(started, check=True, capture_output=True, timeout=200)
        results.append(json.loads((trained / "sharpness.json").read_text()))
    alone, together = results
    for key in ("samples", "loss", "gradient_norm", "eigenvalues", "trace", "m_sharpness", "average_rise", "line"):
        assert flat(together[key]) == pytest.approx(flat(alone[key]), rel=1e-4), key


def flat(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in flat(part)]
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]
