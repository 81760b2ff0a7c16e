"""Every combination of values that is refused: by which case, and in which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esam_dist import config
from esam_dist.config import Config, combinations
from esam_dist.errors import UserError

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
DEEPSPEED = "engine.name=deepspeed"
ZERO3 = f"{DEEPSPEED} engine.zero_stage=3"
WHOLE = "method.beta=1"
EXACT = f"{WHOLE} method.descent=recycled_exact method.score=random method.scope=rank"
LOOKSAM = "method.name=looksam method.interval=5"

# Overrides of the defaults, and what the line must hold: key, value, remedy.
REFUSED = [
    ("method.beta=0", "method.beta = 0 | (0, 1]"),
    ("method.beta={from: 1.5, to: 0.5, epochs: 2}", "method.beta = 1.5 | (0, 1]"),
    ("method.gamma=[[0, 1.0], [5, -0.5]]", "method.gamma = -0.5 | (0, 1]"),
    ("method.rho=[[0, 0.1], [5, -0.1]]", "method.rho = -0.1 | >= 0"),
    ("data.progressive=[[0,0]]", "data.progressive | whole number of pixels"),
    ("data.progressive=[[0,128.5]]", "data.progressive | whole number of pixels"),
    ("data.progressive=[[10,160],[0,128]]", "data.progressive | sort them by epoch"),
    ("data.stream=https://host/a.tar?sig=abc", "data.stream | ${NAME}"),
    ("metrics.gateway=http://host:port", "metrics.gateway | http://HOST:9091"),
    ("optim.nesterov=true optim.momentum=0", "optim.nesterov = true | optim.momentum > 0 | false"),
    ("optim.nesterov=true optim.name=adamw", "optim.nesterov = true | optim.name = sgd"),
    ("optim.schedule=step", "optim.schedule = step | optim.step_epochs | [30, 60, 80]"),
    ("method.start_epoch=20", "method.start_epoch = 20 | train.epochs = 20 | sooner | method.name = sgd"),
    ("method.name=sam method.start_epoch=3 train.epochs=2", "method.start_epoch = 3 | train.epochs = 2"),
    (f"method.name=sam {WHOLE} method.descent=recycled", "method.descent = recycled | method.name = esam"),
    ("method.beta=[[0, 1.0], [5, 0.5]] method.descent=recycled", "method.descent = recycled | method.beta = 1"),
    (f"{WHOLE} method.swp=suffix method.descent=recycled", "method.descent = recycled | method.swp = tensor"),
    (f"{WHOLE} method.descent=recycled_exact method.scope=rank", "recycled_exact | method.score = random"),
    (f"{WHOLE} method.descent=recycled_exact method.score=random", "recycled_exact | method.scope = rank"),
    (f"{EXACT} method.gamma=0.25 data.batch_size=4", "method.gamma = 0.25 | keep 1 of 4 | larger | descent = recycled"),
    (f"{EXACT} method.gamma=0.75 data.batch_size=4", "method.gamma = 0.75 | keep 3 of 4"),
    (f"{EXACT} method.group_size=2", "method.gamma = 0.5 | keep 1 of 2"),
    (f"{EXACT} method.gamma=[[0, 1.0], [5, 0.98]]", "method.gamma = [[0.0, 1.0], [5.0, 0.98]] | keep 63 of 64"),
    (f"{EXACT} method.gamma={{from: 1.0, to: 0.5, epochs: 5}}", "'to': 0.5 | keep 63 of 64 | as a list"),
    ("method.transport=thresholds method.scope=rank", "method.transport = thresholds | method.scope = global"),
    ("method.capacity_factor=1.25 method.scope=rank", "method.capacity_factor | method.scope = global"),
    ("method.capacity_factor=0.9", "method.capacity_factor = 0.9 | at least 1, or 0"),
    ("method.group_size=16", "method.group_size | method.scope = rank"),
    ("method.scope=rank method.group_size=48", "method.group_size = 48 | data.batch_size = 64"),
    ("method.scope=rank method.group_size=128", "method.group_size = 128 | data.batch_size = 64"),
    ("method.name=looksam", "method.name = looksam | method.interval > 1 | 5"),
    (f"{LOOKSAM} train.accumulate=2", "method.name = looksam | train.accumulate = 1"),
    (f"{LOOKSAM} method.group_size=16", "method.name = looksam | method.group_size = 0"),
    ("method.name=msam optim.momentum=0", "method.name = msam | optim.momentum > 0"),
    *(
        (f"{ZERO3} {choice}", "engine.zero_stage = 3 | method.name = sgd or sam | beta = 1 | zero_stage 0, 1 or 2")
        for choice in (
            *("method.beta=0.5", "method.name=asam", "method.name=gsam", "method.name=msam", LOOKSAM),
            *(f"{WHOLE} method.swp=norm", f"{WHOLE} method.swp=element", f"{WHOLE} method.descent=recycled"),
            "method.name=sam method.group_size=16",
        )
    ),
    (f"{DEEPSPEED} engine.zero_stage=0 train.precision=fp16", "train.precision = fp16 | engine.zero_stage 1, 2 | bf16"),
    ("engine.offload=true", "engine.offload = true | engine.name = deepspeed"),
    (f"engine.offload=true {DEEPSPEED} engine.zero_stage=0", "engine.offload = true | engine.zero_stage 1, 2 or 3"),
    (f"{ZERO3} {WHOLE} engine.offload=true", "engine.offload = true | engine.zero_stage = 3 | zero_stage 1 or 2"),
    (f"{ZERO3} {WHOLE} train.accumulate=2", "engine.zero_stage = 3 | train.accumulate = 1 | zero_stage 0, 1 or 2"),
    ("metrics.gateway=http://user:secret@host", "metrics.gateway | password | network"),
]

ACCEPTED = [
    "method.start_epoch=19.5",
    # Plain steps only, as a recipe tried with fewer epochs has them.
    "method.name=sgd method.start_epoch=30",
    f"{EXACT} method.gamma=1",
    f"{EXACT} method.gamma=[[0, 1.0], [5, 0.5]]",
    f"{EXACT} method.gamma={{from: 0.75, to: 0.25, epochs: 5}}",
    f"{EXACT} method.gamma=0.5 method.group_size=4",
    f"{EXACT} data.batch_size=1",
    f"{WHOLE} method.descent=recycled method.gamma={{from: 1.0, to: 0.01, epochs: 5}}",
    "method.capacity_factor=1",
    "method.name=sam method.group_size=16",
    f"{ZERO3} {WHOLE}",
    f"{ZERO3} method.name=sgd train.accumulate=1",
    f"{DEEPSPEED} engine.offload=true train.precision=fp16",
]


def split(overrides: str) -> list[str]:
    return re.split(r" (?=\w+\.\w+=)", overrides)


@pytest.fixture
def load(tmp_path):
    """The defaults with overrides; the project's path is not needed."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    return lambda overrides: config.load(empty, split(overrides))


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_what_does_not_go_together_is_refused_in_one_line(load, overrides, words):
    with pytest.raises(UserError) as caught:
        load(overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    for word in words.split(" | "):
        assert word in line


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_what_makes_sense_is_taken(load, overrides):
    load(overrides)


def test_every_refusal_has_a_case(load, monkeypatch):
    taken: list[Config] = []
    monkeypatch.setattr(combinations, "check", taken.append)
    for overrides, _ in REFUSED:
        load(overrides)
    first = [next(n for n, (refused, _) in enumerate(combinations.faults(cfg)) if refused) for cfg in taken]
    missing = set(range(len(combinations.faults(Config())))).difference(first)
    assert not missing, [combinations.faults(Config())[n][1] for n in missing]


@pytest.mark.parametrize("name", ["sgd", "sam"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_takes_the_methods_to_compare_with(path, name):
    assert config.load(path, [f"method.name={name}"]).method.name == name
