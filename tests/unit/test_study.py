"""Comparisons: what a study file may say, which runs follow from it, and what is made of their results."""

import json
import math
from pathlib import Path

import pytest
import yaml

from esam_dist import config
from esam_dist.compare import calibrate, page, plan, runs, statistics, study
from esam_dist.compare.plan import Cost, Planned, Setting, Variant
from esam_dist.compare.runs import Result, duration
from esam_dist.data.dataset import open_split
from esam_dist.data.prepare.held_out import HeldOut
from esam_dist.data.prepare.write import Plan, write_dataset
from esam_dist.errors import UserError
from esam_dist.train import learning_rate

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"sgd": {"overrides": {"method.name": "sgd"}}, "sam": {"overrides": {"method.name": "sam"}}}
COSTS = {"sgd": Cost(0.1, 1e9, 8), "sam": Cost(0.2, 3e9, 8)}


@pytest.fixture
def write(tiny, tmp_path):
    """Write a study file: the smallest one, with changes."""

    def write(**changes):
        values = {
            "base": str(tiny),
            "folder": str(tmp_path / "study"),
            "methods": METHODS,
            "budgets": [1, 3, 9],
            "seeds": [0, 1, 2],
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}, sort_keys=False))
        return path

    return write


@pytest.fixture
def read(write):
    return lambda **changes: study.load(write(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": [1]}, ["unknown key 'budget'", "budgets"]),
        ({"tuning": {"shares": 0.1}}, ["unknown key 'tuning.shares'", "share"]),
        ({"methods": METHODS | {"x": {"override": {}}}}, ["unknown key 'methods.x.override'", "overrides"]),
        ({"seeds": None}, ["seeds is missing", "required"]),
        ({"seeds": [0, 0]}, ["seeds = [0, 0]", "twice"]),
        ({"seeds": [-1]}, ["seeds.0 = -1"]),
        ({"budgets": []}, ["budgets = []"]),
        ({"budgets": [0.0]}, ["budgets.0 = 0.0"]),
        ({"methods": {"sgd": {}}}, ["methods", "at least 2"]),
        ({"methods": METHODS | {"a/b": {}}}, ["methods.a/b", "pattern"]),
        ({"overrides": {"run.seed": 3}}, ["overrides", "run.seed is set by the study"]),
        ({"overrides": {"optim": {"lr": 1}}}, ["overrides", "'optim' is no key", "section.key"]),
        ({"methods": METHODS | {"x": {"overrides": {"data.path": "y"}}}}, ["methods.x.overrides", "the same for all"]),
        ({"methods": METHODS | {"x": {"grid": {"train.epochs": [1, 2]}}}}, ["methods.x.grid", "is set by the study"]),
        ({"comparisons": [["sam", "sgdd"]]}, ["comparisons", "'sgdd' is no method", "sgd, sam"]),
        ({"comparisons": [["sam", "sam"]]}, ["comparisons.0", "twice"]),
        ({"targets": [95]}, ["targets.0 = 95"]),
        ({"equal": "energy"}, ["equal = energy", "one of time, flops, epochs"]),
        ({"methods": METHODS | {"x": {"grid": {"optim.lr": []}}}}, ["methods.x.grid.optim.lr = []"]),
        ({"methods": METHODS | {"x": {"grid": {"optim.lr": [1, 2]}}}}, ["sgd 1, sam 1, x 2", "equally many"]),
    ],
)
def test_a_bad_study_file_is_one_line_that_names_the_key(read, changes, words):
    with pytest.raises(UserError) as error:
        read(**changes)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": {"optim.rate": 3}}, ["unknown key 'optim.rate'"]),
        ({"methods": METHODS | {"x": {"overrides": {"method.name": "sgd", "method.rho": 1}}}}, ["method.rho"]),
        ({"accuracy": "averaged"}, ["accuracy = averaged", "train.average = none"]),
    ],
)
def test_every_configuration_is_checked_before_the_first_run(read, changes, words):
    with pytest.raises(UserError) as error:
        plan.check(read(**changes))
    for word in words:
        assert word in str(error.value)


def test_a_study_is_written_with_its_defaults_and_read_back(read, tmp_path):
    first = read(targets=[0.5], comparisons=[["sam", "sgd"]])
    (tmp_path / "again.yaml").write_text(study.dump(first))
    assert "repeats: 5" in study.dump(first)
    assert study.load(tmp_path / "again.yaml") == first


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.name)
def test_example_studies_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    declared = study.load(path)
    plan.check(declared)
    assert list(study.advice(declared)) == []


def test_the_page_about_studies_names_every_key():
    text = (ROOT / "docs/compare.md").read_text()
    for key in study.Study.model_fields:
        assert f"| `{key}` |" in text, key


def test_weak_designs_are_told(read):
    assert list(study.advice(read(comparisons=[["sam", "sgd"]]))) == []
    told = "\n".join(study.advice(read(budgets=[1, 1.5, 2], seeds=[0])))
    for key in ("budgets", "seeds", "comparisons"):
        assert f"{key}" in told


def planned(read, costs=COSTS, samples=80, **changes):
    declared = read(**changes)
    chosen = {method: trials[0] for method, trials in plan.variants(declared).items()}
    return list(plan.runs(declared, chosen, costs, Setting(samples, {})))


@pytest.mark.parametrize(("equal", "epochs"), [("time", 1.5), ("flops", 1.0), ("epochs", 3.0)])
def test_epochs_are_the_budget_divided_by_the_cost_and_the_schedule_ends_there(read, equal, epochs):
    (run,) = [run for run in planned(read, equal=equal, seeds=[0]) if (run.variant.method, run.budget) == ("sam", 3.0)]
    cfg = config.load(plan.base_of(read()), list(run.overrides))
    assert run.epochs == cfg.train.epochs == epochs
    assert run.updates == epochs * 10  # of 8 of 80 images
    assert run.budget_used == pytest.approx(1.0)
    assert learning_rate(cfg, 80, 8)(epochs) == pytest.approx(0.0)


def test_the_share_of_the_budget_counts_whole_updates(read):
    run = planned(read, seeds=[0], budgets=[0.25])[1]
    assert (run.updates, run.epochs) == (2, 0.125)  # 1.25 updates, rounded up
    assert run.budget_used == pytest.approx(2 / 1.25)


def test_all_that_is_counted_in_epochs_is_stretched(read):
    overrides = {
        "optim.schedule": "step",
        "optim.step_epochs": [2, 3],
        "optim.warmup_epochs": 1,
        "data.progressive": [[2, 8]],
    }
    run = planned(read, overrides=overrides, seeds=[0], budgets=[8])[1]
    cfg = config.load(plan.base_of(read()), list(run.overrides))
    assert cfg.train.epochs == 4  # as many as the base has, at twice the cost
    twice = planned(read, overrides=overrides, seeds=[0], budgets=[8])[0]
    cfg = config.load(plan.base_of(read()), list(twice.overrides))
    assert (cfg.optim.step_epochs, cfg.optim.warmup_epochs, cfg.data.progressive) == ([4, 6], 2.0, [[4.0, 8]])
    esam = {"sgd": METHODS["sgd"], "sam": {"overrides": {"method.name": "esam"}}}
    run = planned(read, methods=esam, seeds=[0], budgets=[16])[1]
    cfg = config.load(plan.base_of(read()), list(run.overrides))
    assert cfg.method.beta.knots == ((0.0, 1.0), (4.0, 0.5))
    assert cfg.method.gamma.knots == ((0.0, 1.0), (2.0, 0.5))


def test_runs_are_ordered_seed_by_seed_and_differ_in_folder_and_hash(read):
    todo = planned(read)
    assert [run.seed for run in todo] == [0] * 6 + [1] * 6 + [2] * 6
    assert len({run.folder for run in todo}) == 6 * 3
    assert len({run.config_hash for run in todo}) == 6  # of each method at each budget; the seed is no part of it
    moved = planned(read, folder="elsewhere")
    assert [run.config_hash for run in moved] == [run.config_hash for run in todo]


def test_a_grid_is_every_combination(read):
    grids = {
        "sgd": {"grid": {"optim.lr": [0.1, 0.2, 0.3, 0.4]}},
        "sam": {"grid": {"optim.lr": [0.1, 0.2], "method.rho": [0.01, 0.02]}},
    }
    trials = plan.variants(read(methods=grids))["sam"]
    assert [(v.values["optim.lr"], v.values["method.rho"]) for v in trials] == [
        *((0.1, 0.01), (0.1, 0.02)),
        *((0.2, 0.01), (0.2, 0.02)),
    ]
    assert trials[3].name == "sam (lr 0.2, rho 0.02)"


def test_held_out_images_are_training_images_and_no_other(few_digits, tmp_path):
    source = HeldOut(few_digits, 0.25)
    write_dataset(source, tmp_path / "derived", Plan())

    def images(root, split):
        opened = open_split(root, split)
        return sorted((opened.read(n), opened.label(n)) for n in range(opened.num_samples))

    derived = {split: images(tmp_path / "derived", split) for split in ("train", "validation")}
    assert sorted(derived["train"] + derived["validation"]) == images(few_digits, "train")
    assert 15 <= len(derived["validation"]) <= 25
    assert HeldOut(few_digits, 0.25).digest == source.digest
    assert HeldOut(few_digits, 0.2).digest != source.digest


def test_costs_are_exact_in_flops_and_count_every_update_of_a_period(read):
    methods = {
        "sgd": {"overrides": {"method.name": "sgd"}},
        "sam": {"overrides": {"method.name": "sam"}, "grid": {}},
        "looksam": {"overrides": {"method.name": "looksam", "method.interval": 4}},
        "half": {"overrides": {"method.name": "sam", "method.phase": {"from": 0.5, "to": 1}}},
    }
    measured = calibrate.measure(read(methods=methods, repeats=1))["costs"]
    relative = {name: row["flops"] / measured["sgd"]["flops"] for name, row in measured.items()}
    assert relative["sam"] == pytest.approx(2.0, rel=0.01)
    assert relative["looksam"] == pytest.approx(1.25, rel=0.01)
    assert relative["half"] == pytest.approx(1.5, rel=0.01)
    assert all(row["seconds"] > 0 and row["images"] == 8 for row in measured.values())


def test_updates_are_timed_in_turn_and_what_costs_the_same_once(read, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, cfg):
            self.name, self.cost = (cfg.method.name, getattr(cfg.method, "rho", None)), 0.1

        def update(self, moment):
            seen.append(self.name[0])
            # the third timing of all is disturbed
            return 9.0 if len(seen) == 23 else {"sgd": 1.0, "sam": 2.0}[self.name[0]]

    monkeypatch.setattr(calibrate, "Trainer", Recorder)
    monkeypatch.setattr(calibrate, "_flops", lambda declared, variant: {"sgd": 1.0, "sam": 2.0}[variant.method])
    grid = {
        "sgd": METHODS["sgd"] | {"grid": {"optim.lr": [1, 2]}},
        "sam": METHODS["sam"] | {"grid": {"method.rho": [1, 2]}},
    }
    measured = calibrate.measure(read(methods=grid, repeats=3))["costs"]
    assert seen == ["sgd", "sam"] * calibrate.MOMENTS * 4
    assert [row["seconds"] for row in measured.values()] == [1.0, 1.0, 2.0, 2.0]


def test_the_time_left_is_what_was_predicted_times_how_much_longer_runs_took(read, monkeypatch, caplog):
    declared = read(jobs=2, seeds=[0], budgets=[1, 2])
    todo = planned(read, seeds=[0], budgets=[1, 2])
    seconds = [0.0]

    class Process:
        """Ends at the first look, its run finished."""

        def __init__(self, command, **_):
            folder = next(word.partition("=")[2].strip('"') for word in command if word.startswith("run.folder="))
            (run,) = [run for run in todo if str(run.folder) == folder]
            row = {"kind": "validation", "step": run.updates, "epoch": 1.0, "accuracy": 0.5}
            (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

        def poll(self):
            return 0

    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(runs.time, "sleep", lambda _: seconds.__setitem__(0, seconds[0] + 6.0))
    caplog.set_level("INFO")
    assert runs.Runner(declared, 1.0, lambda: False).carry_out(todo, later=100.0)
    # sgd of budget 1: 10 updates of 0.1 s and a second to start, so 2 s, which took 6; left are 8 s of runs, two at a
    # time, but for its own, and the 100 s that come later
    first = caplog.messages[0]
    assert [run.seconds for run in todo] == [1.0, 1.0, 2.0, 2.0]
    assert first.startswith("1 of 4: sgd, budget 1, seed 0: accuracy 0.5000; ")
    assert first.endswith(f"; {duration(3 * (100 + (2 + 2 + 3 + 3) / 2 - 1))} left in all")


# Statistics, against examples by hand


def test_holm_is_as_in_the_textbook():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []
    corrected = statistics.holm([0.01, math.nan])
    assert corrected[0] == pytest.approx(0.02)  # what cannot be tested was declared all the same
    assert math.isnan(corrected[1])


def test_p_is_that_of_the_paired_t_test():
    # d = 1, 2, 3: t = 2 / (1 / sqrt(3)); with two degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 2 * math.sqrt(3)
    assert statistics.paired_p([1, 4, 9], [0, 2, 6]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert math.isnan(statistics.paired_p([1.0], [0.0]))
    assert math.isnan(statistics.paired_p([1.0, 2.0], [0.5, 1.5]))


def result(method, budget, seed, raw, averaged=None, curve=(), number=0):
    run = Planned(
        Variant(method, number, {}, {}), budget, seed, Path(), (), "hash", budget, 10, 1.0, 100.0 * budget, 1e9
    )
    return Result(run, raw, averaged, list(curve))


def table(values):
    """{(method, budget): accuracies by seed} as results."""
    return [result(m, b, seed, raw) for (m, b), row in values.items() for seed, raw in enumerate(row)]


RESULTS = {
    ("sgd", 1.0): [0.50, 0.52, 0.54],
    ("sam", 1.0): [0.40, 0.41, 0.42],
    ("sgd", 3.0): [0.60, 0.62, 0.64],
    ("sam", 3.0): [0.61, 0.64, 0.67],
}


def test_differences_are_paired_by_seed_and_corrected_over_all_budgets(read):
    declared = read(budgets=[3, 1], comparisons=[["sam", "sgd"]])
    results = [r for r in table(RESULTS) if (r.run.variant.method, r.run.budget, r.run.seed) != ("sam", 1.0, 2)]
    small, large = statistics.differences(declared, statistics.cells(declared, results))
    assert (small.budget, small.num_seeds, large.budget, large.num_seeds) == (1.0, 2, 3.0, 3)
    assert small.mean == pytest.approx(-0.105)
    assert math.isnan(small.half)
    assert large.mean == pytest.approx(0.02)
    assert large.half == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)  # Student's t, two degrees of freedom
    t = 2 * math.sqrt(3)
    assert large.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert sorted([small.p_holm, large.p_holm]) == pytest.approx(sorted(statistics.holm([small.p, large.p])))
    assert min(small.p_holm, large.p_holm) == pytest.approx(2 * min(small.p, large.p))


def test_a_run_that_diverged_is_counted_and_left_out_of_the_mean(read):
    declared = read(budgets=[1], comparisons=[["sam", "sgd"]])
    results = table({("sgd", 1.0): [0.5, 0.6, 0.7], ("sam", 1.0): [0.5, math.nan, 0.8]})
    sgd, sam = statistics.cells(declared, results)
    assert (sgd.diverged, sam.diverged, len(sam.results)) == (0, 1, 2)
    assert sam.mean == pytest.approx(0.65)
    (row,) = statistics.differences(declared, [sgd, sam])
    assert (row.num_seeds, row.mean) == (2, pytest.approx(0.05))


def test_the_front_is_the_best_of_a_budget_that_beats_all_smaller_ones(read):
    values = RESULTS | {("sgd", 9.0): [0.60] * 3, ("sam", 9.0): [0.63] * 3}
    cells = statistics.cells(read(), table(values))
    assert [(cell.method, cell.budget) for cell in statistics.front(cells)] == [("sgd", 1.0), ("sam", 3.0)]


def test_time_to_target_is_a_median_over_all_seeds_reached_or_not(read):
    declared = read(targets=[0.9])
    curves = {
        ("sgd", 0): [(10.0, 0.8), (20.0, 0.9), (30.0, 0.89)],
        ("sgd", 1): [(10.0, 0.8), (40.0, 0.95)],
        ("sgd", 2): [(10.0, 0.8)],
        ("sam", 0): [(10.0, 0.8)],
        ("sam", 1): [(10.0, 0.8)],
        ("sam", 2): [(5.0, 0.99)],
    }
    results = [result(method, 1.0, seed, 0.9, curve=curve) for (method, seed), curve in curves.items()]
    results.append(result("sgd", 3.0, 0, 0.9, curve=[(15.0, 0.91)]))
    sgd, sam = statistics.times_to_target(declared, results)
    assert (sgd.num_reached, sgd.num_seeds, sgd.seconds) == (2, 3, 40.0)
    assert (sam.num_reached, sam.num_seeds, sam.seconds) == (1, 3, math.inf)


def test_the_best_trial_is_chosen_by_its_mean_and_divergence_is_worst(read):
    scores = {0: [0.9, math.nan], 1: [0.6, 0.6], 2: [0.6, 0.6], 3: [0.5, 0.6]}
    results = [result("sam", 1.0, seed, raw, number=n) for n, row in scores.items() for seed, raw in enumerate(row)]
    assert statistics.choose(read(), results) == {"sam": 1}


def test_the_averaged_accuracy_is_compared_where_the_study_says_so(read):
    results = [result("sgd", 1.0, 0, 0.1, averaged=0.5)]
    assert statistics.cells(read(), results)[0].mean == 0.1
    assert statistics.cells(read(accuracy="averaged"), results)[0].mean == 0.5


def test_the_page_tells_all_and_loads_nothing(read):
    declared = read(budgets=[1, 3], comparisons=[["sam", "sgd"]], targets=[0.6], methods=METHODS)
    chosen = {name: trials[0] for name, trials in plan.variants(declared).items()}
    text = page.page(declared, table(RESULTS), [], chosen, COSTS)
    for word in ("finished", "sam - sgd", "p (Holm)", "Pareto front", "<polyline", "not reached", "2.000", "budgets:"):
        assert word in text, word
    for word in ("http", "<script", "src=", "nan"):
        assert word not in text, word
    assert "not finished: 11 of 12 runs" in page.page(declared, table(RESULTS)[1:], [], chosen, COSTS)
    assert page.page(declared, [], [], {}, COSTS)


def test_results_are_a_row_a_run():
    lines = page.results_csv([result("sam", 3.0, 1, 0.5, averaged=0.6), result("sam", 3.0, 2, math.nan)]).splitlines()
    assert lines[0].split(",") == list(page.RESULTS)
    assert lines[1] == "sam,,hash,1,3,3,10,1.0000,0.500000,0.600000,300,1e+09"
    assert lines[2] == "sam,,hash,2,3,3,10,1.0000,,,300,1e+09"


@pytest.mark.parametrize(("seconds", "words"), [(89.4, "89 s"), (150, "2.5 min"), (7200, "2.0 h")])
def test_durations_are_for_people(seconds, words):
    assert duration(seconds) == words
