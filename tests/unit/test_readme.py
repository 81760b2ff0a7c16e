"""What the README says of keys, costs, commands and files is true; `make readme` writes its tables."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from esam_dist import config
from esam_dist.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/step_cost/results"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md")]


def keys():
    """The keys as a table, in the order of the config."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, (default, text) in config.keys().items():
        meaning = " ".join(text.split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(rows) + "\n"


def costs():
    """What a step of each mode costs, as `benchmarks.step_cost` has measured it."""
    measured, few, counts = (
        measured_costs("summary_cpu"),
        measured_costs("summary_cpu_goals"),
        measured_costs("counts_cpu"),
    )
    rows = [
        "| mode | FLOPs / SGD | time / SGD | time, six modes | peak memory above SGD | ViT-S/16: FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for (model, mode), row in measured.items():
        if model == "resnet50":
            vit = [int(counts["vit_small", counted]["flops_per_sample"]) for counted in (mode, "sgd")]
            memory = f"{int(row['extra_memory_bytes']) / 2**20:+.0f} MiB"
            times = f"{spread(row)} | {spread(few.get((model, mode)))}"
            rows.append(f"| {mode} | {float(row['flop_ratio']):.2f} | {times} | {memory} | {vit[0] / vit[1]:.2f} |")
    return "\n".join(rows) + "\n"


def measured_costs(name):
    """The results called `name`, by network and mode."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return {(row["model"], row["mode"]): row for row in csv.DictReader(file)}


def spread(row):
    """Median and quartiles of the time; empty where nothing was measured."""
    return f"{float(row['wall_median']):.2f} ({float(row['wall_q1']):.2f}-{float(row['wall_q3']):.2f})" if row else ""


TABLES = {"keys": keys, "costs": costs}


def parts(name, text):
    """What stands before, in and after a table of the README."""
    before, begin, rest = text.partition(f"<!-- {name}: `python -m tests.unit.test_readme` writes this table -->\n")
    inside, end, after = rest.partition(f"<!-- end of {name} -->")
    assert begin, f"no table of {name}"
    assert end, f"no end of {name}"
    return before + begin, inside, end + after


def commands():
    """Every `esam-dist ...` and `-m esam_dist ...` in the README's blocks, as arguments."""
    for block in re.findall(r"^```\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            _, found, arguments = re.sub(r"(-m|--module) esam_dist ", "esam-dist ", line).partition("esam-dist ")
            if found:
                yield shlex.split(arguments, comments=True)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_is_configured_and_measured(name):
    assert parts(name, README.read_text())[1] == TABLES[name](), "run `make readme`"


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_every_command_of_the_readme_is_understood(arguments):
    args = _parser().parse_args(arguments)
    if arguments[0] == "train":
        config.load(ROOT / args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


if __name__ == "__main__":
    for name, table in TABLES.items():
        before, _, after = parts(name, README.read_text())
        README.write_text(before + table() + after)
