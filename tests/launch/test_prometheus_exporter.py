"""The rules on what a rank really exposes: its pages, one a minute over starts and ends, are promtool's input."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from test_prometheus_files import RULES, promtool

from esam_dist import config
from esam_dist.cli import _progress
from esam_dist.metrics import Metrics, TrainRow
from esam_dist.ranks import Ranks
from esam_dist.run_folder import note_not_finite, open_run_folder, read_history

NUMBERS = ["lr", "grad_norm", "sharpness", "kept_fraction", "images_per_second", "data_wait_seconds"]
ROW = TrainRow(
    step=0,
    epoch=0.0,
    loss=1.0,
    **dict.fromkeys([*NUMBERS, "rho", "beta", "gamma", "selection_threshold"], 0.5),
    step_seconds=6.0,
    samples=0,
    kept_samples=50,
)


class Watched:
    """A run of 1000 updates of 100 samples, ten a minute, and the pages that a Prometheus got from rank 0."""

    def __init__(self, folder):
        self.cfg = config.parse({"run": {"folder": str(folder)}, "train": {"max_steps": 1000}}, "test")
        self.pages = []

    def start(self):
        folder = open_run_folder(self.cfg, Ranks())
        progress = _progress(self.cfg, None, read_history(folder), SimpleNamespace(num_samples=10**6))
        self.metrics = Metrics(folder, self.cfg.metrics, Ranks(), {}, progress)
        self.scrape()

    def scrape(self, minutes=1):
        families = text_string_to_metric_families(generate_latest(self.metrics.registry).decode())
        page = {}
        for sample in [sample for family in families for sample in family.samples if sample.name.startswith("esam_")]:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            page[f'{sample.name}{{job="esam",run="r",{labels}}}'] = sample.value
        self.pages += [page] * minutes

    def train(self, step, **changes):
        self.metrics.progress(step)
        self.metrics.train(replace(ROW, **{"step": step, "epoch": step / 100, "samples": 100 * step} | changes))

    def end(self, minutes):
        """Rank 0 is gone, and its target does not answer for so long."""
        self.metrics.close()
        self.pages += [{}] * minutes

    def series(self):
        names = dict.fromkeys(name for page in self.pages for name in page)
        return [{"series": name, "values": " ".join(self._values(name))} for name in names]

    def _values(self, name):
        for page, before in zip(self.pages, [{}, *self.pages], strict=False):
            yield str(page[name]).replace("nan", "NaN") if name in page else "stale" if name in before else "_"


@pytest.fixture
def watched(tmp_path):
    run = Watched(tmp_path / "run")
    yield run
    run.metrics.close()


@pytest.fixture
def fires(tmp_path, watched):
    """Check the names of the alerts that fire at given minutes."""

    def check(expected):
        cases = [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
            }
            for minute, names in expected.items()
        ]
        test = {"interval": "1m", "input_series": watched.series(), "promql_expr_test": cases}
        values = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(values))
        promtool("test", "rules", str(tmp_path / "test.yaml"))

    return check


def test_a_crash_loop_without_a_checkpoint_fires_at_the_third_restart(watched, fires):
    for _ in range(5):
        watched.start()
        watched.scrape(3)
        watched.end(2)
    fires({5: [], 14: [], 20: ["EsamRestarting"]})


def test_one_restart_of_a_run_that_has_had_many_is_quiet(watched, fires):
    for _ in range(7):
        open_run_folder(watched.cfg, Ranks())
    watched.start()
    watched.scrape(10)
    watched.end(2)
    watched.start()
    watched.scrape(10)
    fires({5: [], 22: []})


def test_a_loss_that_is_not_finite_fires_after_the_restart(watched, fires):
    watched.start()
    watched.train(10)
    watched.scrape(3)
    watched.train(20, loss=math.nan)
    note_not_finite(watched.cfg.run.folder)
    watched.end(2)
    watched.start()
    watched.scrape(70)
    fires({5: [], 7: ["EsamLossNotFinite"], 50: ["EsamLossNotFinite"], 75: []})


def test_a_checkpoint_that_could_not_be_written_fires_for_an_hour(watched, fires):
    watched.start()
    for minute in range(1, 91):
        watched.train(10 * minute)
        if minute == 10:
            watched.metrics.checkpoint_failed(100)
        elif minute % 10 == 0:
            watched.metrics.checkpoint_saved(10 * minute, 0.1)
        watched.scrape()
    fires({9: [], 20: ["EsamCheckpointFailing"], 85: []})


def test_a_shard_that_is_found_broken_once_fires(watched, fires):
    watched.start()
    for minute in range(1, 31):
        watched.train(10 * minute, skipped_samples={"broken_shard": 60} if minute == 10 else {})
        watched.scrape()
    fires({9: [], 20: ["EsamSkippedSamples"]})


def test_a_run_that_dies_half_way_fires(watched, fires):
    watched.start()
    watched.train(500)
    watched.scrape(2)
    watched.end(20)
    fires({10: [], 15: ["EsamEndedEarly"]})


@pytest.mark.parametrize("last", [985, 1000])  # a scrape seldom comes between the last update and the end
def test_a_run_that_comes_to_its_end_is_quiet(watched, fires, last):
    watched.start()
    watched.train(500)
    watched.scrape(2)
    watched.train(last)
    watched.scrape()
    watched.end(20)
    fires({10: [], 20: []})
