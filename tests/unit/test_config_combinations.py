"""Every combination of values that is refused: by which case, and in which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esam_dist import config
from esam_dist.config import Config, combinations
from esam_dist.errors import UserError
from esam_dist.methods import METHODS

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
DEEPSPEED = "engine.name=deepspeed"
ZERO3 = f"{DEEPSPEED} engine.zero_stage=3"
WHOLE = "method.beta=1"
RECYCLED = "method.name=recycled"
EXACT = f"{RECYCLED} method.exact=true method.score=random method.scope=rank"
LOOKSAM = "method.name=looksam method.interval=5"

# Overrides of the defaults, and what the line must hold: key, value, remedy.
REFUSED = [
    ("data.progressive=[[0,0]]", "data.progressive | whole number of pixels"),
    ("data.progressive=[[0,128.5]]", "data.progressive | whole number of pixels"),
    ("data.progressive=[[10,160],[0,128]]", "data.progressive | sort them by epoch"),
    ("data.stream=https://host/a.tar?sig=abc", "data.stream | ${NAME}"),
    ("metrics.mlflow=https://me:word@host", "metrics.mlflow | MLFLOW_TRACKING_PASSWORD"),
    ("data.sampling=balanced data.stream=pipe:x data.stream_samples=9", "data.sampling = balanced | data.stream"),
    ("train.class_weights=balanced data.stream=pipe:x", "train.class_weights = balanced | data.stream | data.path"),
    ("metrics.gateway=http://host:port", "metrics.gateway | http://HOST:9091"),
    ("optim.nesterov=true optim.momentum=0", "optim.nesterov = true | optim.momentum > 0 | false"),
    ("optim.nesterov=true optim.name=adamw", "optim.nesterov = true | optim.name = sgd"),
    ("optim.schedule=step", "optim.schedule = step | optim.step_epochs | [30, 60, 80]"),
    (
        f"{RECYCLED} method.exact=true method.score=loss method.scope=rank",
        "method.exact = true | method.score = random",
    ),
    (f"{RECYCLED} method.exact=true method.score=random", "method.exact = true | method.scope = rank"),
    (f"{EXACT} method.gamma=0.25 data.batch_size=4", "method.gamma = 0.25 | keep 1 of 4 | larger | exact = false"),
    (f"{EXACT} method.gamma=0.75 data.batch_size=4", "method.gamma = 0.75 | keep 3 of 4"),
    (f"{EXACT} method.group_size=2", "method.gamma = 0.25 | keep 1 of 2"),
    (f"{EXACT} method.gamma=[[0, 1.0], [5, 0.98]]", "method.gamma = [[0.0, 1.0], [5.0, 0.98]] | keep 63 of 64"),
    (f"{EXACT} method.gamma={{from: 1.0, to: 0.5, epochs: 5}}", "'to': 0.5 | keep 63 of 64 | as a list"),
    ("method.transport=thresholds method.scope=rank", "method.transport = thresholds | method.scope = global"),
    ("method.capacity_factor=1.25 method.scope=rank", "method.capacity_factor | method.scope = global"),
    ("method.capacity_factor=0.9", "method.capacity_factor = 0.9 | at least 1, or 0"),
    ("method.group_size=16", "method.group_size | method.scope = rank"),
    ("method.scope=rank method.group_size=48", "method.group_size = 48 | data.batch_size = 64"),
    ("method.scope=rank method.group_size=128", "method.group_size = 128 | data.batch_size = 64"),
    ("method.name=looksam method.interval=1", "method.name = looksam | method.interval > 1 | 5"),
    (f"{LOOKSAM} train.accumulate=2", "method.name = looksam | train.accumulate = 1"),
    (f"{LOOKSAM} method.group_size=16", "method.name = looksam | method.group_size = 0"),
    ("method.name=msam optim.momentum=0", "method.name = msam | optim.momentum > 0"),
    ("method.direction=momentum optim.momentum=0", "method.direction = momentum | optim.momentum > 0"),
    (f"{WHOLE} method.direction=average train.accumulate=2", "method.direction = average | train.accumulate = 1"),
    (
        f"{RECYCLED} method.direction=residual method.scope=rank method.group_size=16",
        "residual | method.group_size = 0",
    ),
    ("method.direction=residual", "method.direction = residual | method.beta = 1"),
    (f"{WHOLE} method.swp=suffix method.direction=average", "method.direction = average | method.swp = tensor"),
    *(
        (f"{ZERO3} {choice}", f"engine.zero_stage = 3 | cannot {cannot} | zero_stage 0, 1 or 2 | sam, asam or gsam")
        for choice, cannot in (
            ("method.beta=0.5", "draw some of the weights (give method.beta = 1"),
            (f"{WHOLE} method.swp=norm", "draw some of the weights"),
            ("method.name=msam", "climb along the momentum"),
            (f"{WHOLE} method.direction=momentum", "climb along the momentum"),
            (LOOKSAM, "remember a vector"),
            (f"{WHOLE} method.direction=previous", "remember a vector"),
            (RECYCLED, "recycle a gradient"),
            ("method.name=sam method.group_size=16", "perturb groups of a batch apart (give method.group_size = 0)"),
        )
    ),
    (f"{DEEPSPEED} engine.zero_stage=0 train.precision=fp16", "train.precision = fp16 | engine.zero_stage 1, 2 | bf16"),
    ("engine.offload=true", "engine.offload = true | engine.name = deepspeed"),
    (f"engine.offload=true {DEEPSPEED} engine.zero_stage=0", "engine.offload = true | engine.zero_stage 1, 2 or 3"),
    (f"{ZERO3} {WHOLE} engine.offload=true", "engine.offload = true | engine.zero_stage = 3 | zero_stage 1 or 2"),
    (f"{ZERO3} {WHOLE} train.average=ema", "train.average = ema | zero_stage"),
    (f"{ZERO3} {WHOLE} train.accumulate=2", "engine.zero_stage = 3 | train.accumulate = 1 | zero_stage 0, 1 or 2"),
    ("metrics.gateway=http://user:secret@host", "metrics.gateway | password | network"),
]

ACCEPTED = [
    "method.phase={from: 0.5, to: 1}",
    f"{EXACT} method.gamma=1",
    f"{EXACT} method.gamma=[[0, 1.0], [5, 0.5]]",
    f"{EXACT} method.gamma={{from: 0.75, to: 0.25, epochs: 5}}",
    f"{EXACT} method.gamma=0.5 method.group_size=4",
    f"{EXACT} data.batch_size=1",
    f"{RECYCLED} method.gamma={{from: 1.0, to: 0.01, epochs: 5}}",
    f"{ZERO3} method.name=gsam",
    f"{ZERO3} method.name=asam",
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
    """Each method has refusals of its own."""
    taken: list[Config] = []
    monkeypatch.setattr(combinations, "check", taken.append)
    for overrides, _ in REFUSED:
        load(overrides)
    seen = [next(stem(words) for refused, words in combinations.faults(cfg) if refused) for cfg in taken]
    for kind in METHODS.values():
        for _, words in combinations.faults(Config(method=kind())):
            assert not words or stem(words) in seen, words


def stem(words: str) -> tuple[str, list[str]]:
    """A refusal without the values that it names: its key, and its last words."""
    return words.split(" = ", maxsplit=1)[0], words.split()[-4:]


@pytest.mark.parametrize("name", ["sgd", "sam"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_takes_the_methods_to_compare_with(path, name):
    assert config.load(path, [f"method.name={name}"]).method.name == name
