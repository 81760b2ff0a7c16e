"""The configuration: what is taken, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from esam_dist import config
from esam_dist.config import Config
from esam_dist.errors import UserError
from esam_dist.progress import Progress
from esam_dist.schedule import Schedule
from esam_dist.train import final_step, learning_rate


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def refused(path, *overrides):
    with pytest.raises(UserError) as error:
        config.load(path, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_empty_file_gives_every_default(file):
    assert config.load(file("")) == Config()


def test_values_of_the_file_replace_defaults_and_overrides_replace_both(file):
    path = file("train: {epochs: 7, max_steps: 3}\n")
    cfg = config.load(path, ["train.epochs=9", "run.folder=runs/x", "optim.lr=1e-3", "train.epochs=11"])
    assert (cfg.train.epochs, cfg.train.max_steps, cfg.optim.lr) == (11, 3, 0.001)
    assert cfg.run.folder == Path("runs/x")


def test_an_override_may_open_a_section_that_the_file_leaves_empty(file):
    assert config.load(file("train:\n"), ["train.epochs=2", "optim.lr=0.5"]).train.epochs == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.step_epochs=[30, 60]", [30.0, 60.0]),
        ("model.num_classes=null", None),
        ("metrics.tensorboard=true", True),
        ("metrics.gateway=http://host:9091", "http://host:9091"),
        ("data.mean=[0, 0, 0]", [0.0, 0.0, 0.0]),
    ],
)
def test_overrides_are_yaml_values(file, override, expected):
    cfg = config.load(file("optim: {schedule: step, step_epochs: [1]}"), [override])
    assert config.flat(cfg)[override.partition("=")[0]] == expected


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs", "=3", ".epochs=3", "train.=3", "train.a.b=3"])
def test_malformed_override_says_the_form(file, override):
    assert "section.key=value" in refused(file(""), override)


def test_override_that_is_not_yaml_is_named(file):
    assert "not a YAML value" in refused(file(""), "optim.step_epochs=[1,")


def test_override_below_a_plain_value_is_refused(file):
    assert "'train' is not a section" in refused(file("train: 3"), "train.epochs=3")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train: {epoch: 3}", "train.epochs"),
        ("optim: {learning_rate: 3}", "optim."),
        ("method: {bta: 0.5}", "method.beta"),
        ("modle: {name: resnet50}", "model"),
        ("model: {pretrained: true}", "model.weights"),
        ("model: {seed: 1}", "run.seed"),
        ("data: {num_workers: 1}", "data.workers"),
        ("data: {qqq: 1}", "data.path"),
        ("optim: {overrides: [{match: a, lr: 2}]}", "optim.overrides has no key 'lr'"),
    ],
)
def test_unknown_key_names_the_nearest(file, text, nearest):
    message = refused(file(text))
    assert "unknown key" in message or "has no" in message
    assert nearest in message


def test_epochs_are_whole_or_not_and_stay_what_they_were(file):
    path = file("train: {epochs: 3}")
    whole, part = config.load(path), config.load(path, ["train.epochs=0.75", "optim.warmup_epochs=0"])
    assert ("epochs: 3\n" in config.dump(whole), part.train.epochs) == (True, 0.75)
    # 8 updates of 3 of 32 samples: the rate of the last one is near the schedule's end
    assert final_step(part, Progress(), 32, 3) == 8
    assert learning_rate(part, 32, 3)(0.75) == pytest.approx(0.0)


def test_a_rate_by_256_images_grows_with_the_global_batch(file):
    path = file("optim: {lr: 9, lr_per_256: 0.1, warmup_epochs: 0}")
    # 3 ranks, 128 images each, two micro-batches
    assert learning_rate(config.load(path), 10_000, 3 * 128 * 2)(0.0) == pytest.approx(0.3)
    assert learning_rate(config.load(path, ["optim.lr_per_256=0"]), 10_000, 768)(0.0) == 9


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train: {epochs: '3'}", "train.epochs"),
        ("train: {accumulate: 3.5}", "train.accumulate"),
        ("train: {epochs: true}", "train.epochs"),
        ("metrics: {tensorboard: 1}", "metrics.tensorboard"),
        ("model: {name: 3}", "model.name"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {step_epochs: 3}", "optim.step_epochs"),
        ("data: {mean: [0.5, 0.5]}", "data.mean"),
        ("method: {rho: large}", "method.rho"),
        ("train: [epochs]", "train"),
    ],
)
def test_wrong_type_names_key_and_value(file, text, key):
    message = refused(file(text))
    assert f"{key} = " in message
    assert "refused" in message


@pytest.mark.parametrize(
    "override",
    [
        *("run.seed=-1", "run.seed=2147483648", "model.num_classes=1", "data.batch_size=0", "data.workers=-1"),
        *("data.image_size=0", "data.crop_ratio=0", "data.crop_ratio=1.1", "data.std=[1, 1, 0]", "data.max_skipped=2"),
        *("data.augment=blur", "train.epochs=0", "train.max_steps=-1", "train.accumulate=0", "train.precision=fp8"),
        *("train.label_smoothing=1", "train.log_every=0", "optim.name=lion", "optim.lr=-1", "optim.lr=.nan"),
        *("optim.lr=.inf", "optim.momentum=1", "optim.weight_decay=-1", "optim.clip_grad_norm=-1"),
        *("optim.schedule=linear", "optim.step_factor=1", "method.name=lamb", "method.scope=node"),
        *(
            "method.rho=-0.1",
            "method.beta=0",
            "method.beta=1.01",
            "method.gamma=0",
            "method.gamma=2",
            "method.beta=.nan",
        ),
        *("method.gamma=[[0, 1.0], [5, 0]]", "method.beta={from: 1, to: 0, epochs: 3}", "engine.name=fsdp"),
        *("engine.zero_stage=4", "checkpoint.keep=0", "checkpoint.every_steps=-1", "metrics.port=65536"),
        *("metrics.stall_seconds=-1", "metrics.progress=dots", "method.phase={from: 1, to: 0.5}", "method.phase=late"),
        *("method.interval=0", "method.phase={from: 0.5, to: 1.5}", "method.group_size=-1", "method.num_quantiles=1"),
        *("method.capacity_factor=-1", "method.sigma=-1", "method.decay=1", "method.direction=up"),
        *("engine.collective_timeout_seconds=0", "engine.collective_timeout_seconds=.inf"),
    ],
)
def test_value_out_of_range_is_refused_by_key(file, override):
    key = override.partition("=")[0]
    assert key in refused(file(""), override)


@pytest.mark.parametrize(
    "text", ["- 1\n- 2", "just words", "train: {epochs: 3", "\x00", "train: !!python/object:os.system {}"]
)
def test_what_is_no_mapping_of_sections_is_refused(file, text):
    refused(file(text))


def test_missing_file_is_named(tmp_path):
    assert "nowhere.yaml" in refused(tmp_path / "nowhere.yaml")
    assert "cannot be read" in refused(tmp_path)


SCHEDULES = [
    (0.3, Schedule.constant(0.3)),
    (1, Schedule.constant(1.0)),
    ({"from": 1.0, "to": 0.5, "epochs": 10}, Schedule(((0.0, 1.0), (10.0, 0.5)), linear=True)),
    ([[0, 1.0], [5, 0.5]], Schedule(((0.0, 1.0), (5.0, 0.5)))),
]


@pytest.mark.parametrize(("written", "meant"), SCHEDULES)
@pytest.mark.parametrize("key", ["rho", "beta", "gamma"])
def test_every_form_of_a_schedule_is_read(file, key, written, meant):
    assert getattr(config.load(file(yaml.safe_dump({"method": {key: written}}))).method, key) == meant


@pytest.mark.parametrize("written", [value for value, _ in SCHEDULES])
def test_what_is_saved_is_read_back_alike(file, written):
    sections = {
        "method": {"rho": written},
        "optim": {"lr": 1e-5},
        "run": {"folder": "a b/c"},
        "model": {"num_classes": 4},
    }
    cfg = config.load(file(yaml.safe_dump(sections)))
    assert config.load(file(config.dump(cfg))) == cfg


def test_every_key_has_a_default_and_a_description():
    for key in config.keys():  # noqa: SIM118
        assert key.description, key
    own = {key.name for key in config.keys() if not key.methods or "esam" in key.methods}  # noqa: SIM118
    assert own == set(config.flat(Config()))


def test_sections_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 3


def test_another_method_on_the_command_line_drops_the_file_s_keys_of_the_old_one_and_says_so_once(file, caplog):
    path = file("method: {name: esam, rho: 0.1, beta: 0.6, gamma: 0.4}\n")
    with caplog.at_level("INFO"):
        assert config.load(path, ["method.name=sgd"]).method.name == "sgd"
    assert [record.message for record in caplog.records] == [
        f"method.name = sgd has no rho, beta, gamma: what {path} says of it is left out"
    ]
    # What the command line itself says is not forgotten, but refused.
    assert "method.beta is a key of method.name = esam, not of sgd" in refused(path, "method.name=sgd", "method.beta=1")


def test_a_key_that_stays_is_named_where_the_new_method_has_another_default(file, caplog):
    path = file("method: {name: sam, rho: 0.1}\n")
    assert config.load(path, ["method.name=msam"]).method.rho == Schedule.constant(0.1)
    assert [record.message for record in caplog.records] == [
        f"method.rho = 0.1 stays as {path} has it; msam's default is 0.5"
    ]
    caplog.clear()
    config.load(path, ["method.name=asam"])
    config.load(path, ["method.name=msam", "method.rho=1"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {name: sam, beta: 0.5}", "method.beta is a key of method.name = esam, not of sam"),
        ("method: {name: esam, alpha: 0.5}", "method.alpha is a key of method.name = gsam | looksam, not of esam"),
        ("method: {descent: recycled}", "method.descent is no more; remove it, or give method.name = recycled"),
        ("method: {start_epoch: 3}", "method.start_epoch is no more; remove it, or give method.phase"),
        ("method: {name: samm}", "method.name = 'samm' is refused: give one of sgd, sam"),
    ],
)
def test_a_key_of_another_method_or_of_an_earlier_version_names_what_to_change(file, text, words):
    assert words in refused(file(text))
