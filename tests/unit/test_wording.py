"""What a key takes, in words of a configuration; pydantic's own words reach nobody."""

import re

import pytest

from esam_dist import config, methods
from esam_dist.config.explain import explain
from esam_dist.errors import UserError
from esam_dist.methods import METHODS
from esam_dist.wording import takes
from tests.commands import here

PYDANTIC = re.compile(r"Input should|instance of|valid (integer|number|string|dictionary|list|boolean)|pydantic|type=")


def refusal(values):
    with pytest.raises(UserError) as error:
        config.parse(values, "f.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": 5}, "train = 5 is refused: give a section"),
        ({"method": 5}, "method = 5 is refused: give a section"),
        ({"train": {"epochs": "many"}}, "train.epochs = 'many' is refused: give a number > 0"),
        ({"optim": {"name": "x"}}, "give one of sgd, adamw"),
        ({"data": {"mean": [1, 2]}}, "give a list of 3, each a number"),
        ({"data": {"flip": 3}}, "give true or false"),
        ({"model": {"num_classes": 1}}, "give a whole number >= 2, or nothing"),
        ({"model": {"name": 3}}, "give text, in quotes"),
        ({"method": {"phase": 3}}, "method.phase = 3 is refused: give {from: ..., to: ...}"),
        ({"method": {"phase": {"form": 1}}}, "method.phase has no key 'form'"),
        ({"method": {"phase": {"from": "x"}}}, "give a number >= 0 and <= 1"),
    ],
)
def test_a_refused_value_is_told_what_the_key_takes(values, words):
    assert words in refusal(values)


def wrong_values():
    """Every key with a value of a kind that it does not take."""
    for name in config.Config.model_fields:
        for key in type(getattr(config.Config(), name)).model_fields:
            yield {name: {key: object()}}
        yield {name: 3}
    for name, kind in METHODS.items():
        for key in kind.model_fields:
            if key != "name":
                yield {"method": {"name": name, key: object()}}


def test_no_refusal_speaks_of_python():
    for values in wrong_values():
        told = refusal(values)
        assert not PYDANTIC.search(told), told


def test_a_method_of_the_library_is_refused_in_the_same_words():
    with pytest.raises(UserError, match="interval = 'x' is refused: give a whole number >= 1"):
        methods.SAM(interval="x")


def test_a_section_whose_lines_are_all_comments_says_nothing():
    assert config.parse({"train": None, "method": None}, "f.yaml") == config.Config()


def test_every_key_has_words():
    for name in config.Config.model_fields:
        for field in type(getattr(config.Config(), name)).model_fields.values():
            assert takes(field) not in ("any value", "a value of its own kind")


@pytest.mark.parametrize("command", ["train", "config", "launch", "evaluate"])
def test_config_help_explains_a_key_without_a_config(command):
    answer = here(command, "--config-help", "optim.lr")
    assert answer.status == 0
    assert answer.out.splitlines()[:3] == ["optim.lr", "  takes    a number >= 0", "  default  0.1"]
    assert "Peak learning rate" in answer.out


def test_config_help_of_a_key_without_its_section_and_of_a_section():
    assert explain("lr") == explain("optim.lr")
    assert explain("checkpoint").startswith("checkpoint: What survives a failure.\n\ncheckpoint.every_steps\n")
    for key in config.keys():  # noqa: SIM118
        assert key.name in explain(key.name)


def test_config_help_tells_methods_apart():
    told = explain("method.rho")
    assert "method.rho  (msam)\n" in told
    assert "default  0.5" in told
    assert "values at least 0" in told


def test_config_help_of_no_key_is_one_line_with_the_nearest():
    answer = here("train", "--config-help", "optim.lrr")
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert "optim.lr" in answer.err
